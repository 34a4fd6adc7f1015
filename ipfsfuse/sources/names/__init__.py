"""Mutable names: IPNS records and DNSLink, resolved to CIDs."""
