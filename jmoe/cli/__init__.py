"""The command line: argument parsing only. What a command does lies in the part that it calls."""
