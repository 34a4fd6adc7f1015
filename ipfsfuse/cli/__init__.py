"""The command line: arguments in, frozen configuration out; one line for every failure."""
