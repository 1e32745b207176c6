"""Runs Gluon kernels for Hopper on the CPU, to find what is wrong in them; see ``interpreter``."""
