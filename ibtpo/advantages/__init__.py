"""The advantages of the rivals, a file each; `ibtpo.advantage` chooses among them and is what to import."""
