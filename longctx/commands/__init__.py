"""What each `longctx COMMAND` takes (`arguments`), and one file for what each of them runs."""
