"""From raw logs to a release: data, training, evaluation, export, engines, repository, serving, the command."""
