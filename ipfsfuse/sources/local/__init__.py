"""Sources on this machine, read in place: CAR files, the library that `add` fills, a Kubo repository."""
