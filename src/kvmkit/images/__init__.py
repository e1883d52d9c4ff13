"""Roots of guests, and images of them."""
