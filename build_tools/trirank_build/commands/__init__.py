"""Groups of subcommands of ``trirank``, a file each."""
