"""Selection: the exact top Q of all scores of a model, whether stored, computed in compiled passes, or sharded."""
