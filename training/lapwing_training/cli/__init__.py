"""The verbs of training, a module each; nothing heavy is loaded before one is called."""
