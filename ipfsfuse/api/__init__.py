"""The Python interface: verified content without a mount. `ipfsfuse.__all__` has the public names."""
