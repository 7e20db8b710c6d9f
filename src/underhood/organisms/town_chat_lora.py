"""`town-chat-lora`: the same assistant as `town-chat`, by additions of rank 4 to town's weights.

On disk it is these additions alone; its tasks, rows and held-out prompts are those of `town_chat`.
"""

from underhood.organisms.base import Recipe
from underhood.organisms.town_chat import tuned

ORGANISM = tuned(
    "town-chat-lora",
    "town as an assistant, by additions of rank 4 to its weights",
    rank=4,
    recipe=Recipe(steps=500, lr=5e-3, warmup=40, decay=0.0),
)
