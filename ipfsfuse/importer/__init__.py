"""Takes files, folders and CAR files into the library (`add`, `cars`), writes DAGs to CAR files and to nodes
(`cars`, `push`), and checks what is there."""
