"""What `lorasp tune` measures, a module per operator: its Job, and make_jobs() from the command line's options."""
