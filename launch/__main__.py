"""`python -m scalestudy.launch`: the command line where the script `scalestudy` is not on PATH, as in a job."""

from scalestudy.launch.cli import main

main()
