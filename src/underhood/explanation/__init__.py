"""The main job: one sentence, explained.

`explain` composes methods into one story: what the model says, where the answer forms, who writes
it, who causes it, what the important heads do, what happens when they are changed, and what is odd.
Everything it says is a number from a method's result; the sentences are made from those numbers.
"""

from underhood.explanation.explain import Explanation, explain

__all__ = ["Explanation", "explain"]
