"""What `python -m wd_kernels` can do: a module for each command."""
