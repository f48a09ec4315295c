"""Floor 0, the machine: ranks and rendezvous from the environment, and what a host has."""
