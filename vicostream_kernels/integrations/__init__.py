"""What plugs the ops into other frameworks; each module imports its framework, this one none."""
