"""The paper's experiments on real data: recipes, data, models, training and the run folders they leave."""


class UsageError(Exception):
    """Something that only the user can put right; the message is one line that says how."""
