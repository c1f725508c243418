"""The searches, one a file; import them through `ibtpo.search`, which names them."""
