"""The advantages of the other methods, one a file; import them through `ibtpo.advantage`, which chooses among them."""
