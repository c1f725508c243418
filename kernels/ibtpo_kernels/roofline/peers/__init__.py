"""Peers: other implementations of the same ops, found at run time; a missing one raises `Unavailable` with a reason.

Written against: torch 2.10 to 2.13, Liger-Kernel 0.8.5, cut-cross-entropy 25.1.1, TRL 1.16, verl 0.9.1, FlashInfer
0.7.2.
"""
