"""The Python interface: verified content without a mount. What is public stands in `ipfsfuse.__all__`."""
