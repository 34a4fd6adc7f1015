"""Adds files, folders and CAR files to the library (`add`, `cars`), writes DAGs to CAR files and nodes
(`cars`, `push`), and checks the library and CAR files."""
