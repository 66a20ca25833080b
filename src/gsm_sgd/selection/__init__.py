"""Selection: the exact top Q of all scores of a model, whether stored or sharded."""
