"""`ipfsfuse serve`: what is here, as a trustless gateway
(https://specs.ipfs.tech/http-gateways/trustless-gateway/)."""
