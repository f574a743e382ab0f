"""Loops in C++, and what compiles and calls them."""
