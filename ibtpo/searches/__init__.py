"""The searches, a file each; `ibtpo.search` names them and is what to import."""
