"""Tiers, catalog and accounts of one mount together, and what of them is in use."""
