"""What clients of the control socket do: look up, lease, prefetch and put blocks."""
