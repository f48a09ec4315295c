"""Floor 3, the way in: the study file, the launchers, the controller and the command line."""
