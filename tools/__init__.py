"""The `kvfs` command, one module per verb, and trace replay, demo and benchmarks.

It holds no logic that another caller needs: what a verb does, the store or the daemon does for it.
"""
