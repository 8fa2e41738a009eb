"""Named prompt ensembles and the versioned list of generic negatives; changing a list means a new name or version."""

from __future__ import annotations

# Phrases carry their own article ("a handgun"), so a template adds none.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": ("{}",),
    "photo": ("{}", "a photo of {}", "a picture showing {}", "a close-up photo of {}"),
    "cifar-style": (
        "a photo of {}",
        "a blurry photo of {}",
        "a small, low resolution photo of {}",
        "a black and white photo of {}",
        "a high contrast photo of {}",
        "a low contrast photo of {}",
        "a bright photo of {}",
        "a dark photo of {}",
    ),
    "imagenet-like": (
        "a photo of {}",
        "a good photo of {}",
        "a bad photo of {}",
        "a photo of {} up close",
        "a photo of {} from far away",
        "a cropped photo of {}",
        "a bright photo of {}",
        "a dark photo of {}",
        "a jpeg of {}",
        "a drawing of {}",
        "a rendering of {}",
        "{} indoors",
        "{} outdoors",
        "{} in an ordinary scene",
    ),
}
DEFAULT_TEMPLATES = "photo"

# What ordinary images show. A concept is contrasted with these beside its own near misses, so that an image
# of something else altogether does not count as the concept only because it is no near miss either.
GENERIC_NEGATIVES: dict[int, tuple[str, ...]] = {
    1: (
        "people",
        "an animal",
        "a plant",
        "food",
        "a building",
        "a street",
        "a room with furniture",
        "a vehicle",
        "a landscape",
        "clothing",
        "an object on a table",
        "something ordinary",
    ),
}
GENERIC_VERSION = max(GENERIC_NEGATIVES)


def fill(template: str, phrase: str) -> str:
    """The phrase put into the template's one `{}`; never str.format, so braces in data mean nothing."""
    return template.replace("{}", phrase, 1)
