"""The command line: one file a command, `main` dispatches. Nothing below imports from here."""
