"""The `kvfs` command, one module per verb, and trace replay, demo, benchmarks, the file exerciser.

It holds no logic that another caller needs: what a verb does, the store or the daemon does for it.
"""
