"""What the subcommands of `dit-sparse` do; dit_sparse/cli.py holds their arguments and help texts."""
