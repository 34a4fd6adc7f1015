"""The command line. It makes a frozen configuration of the arguments, and prints one line for each
failure."""
