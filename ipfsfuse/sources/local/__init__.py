"""Sources on this machine, read where they lie: CAR files, and the library that `add` fills."""
