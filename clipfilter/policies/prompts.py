"""Named prompt ensembles and the versioned list of generic negatives; changing a list means a new name or version."""

from __future__ import annotations


def _several(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split("|"))


# Phrases carry their own article ("a handgun"), so a template adds none where nothing else is said.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": ("{}",),
    "photo": ("{}", "a photo of {}", "a picture showing {}", "a close-up photo of {}"),
    "cifar-style": _several(
        """
        a photo of {} | a blurry photo of {} | a small, low resolution photo of {} | a black and white photo of {} |
        a high contrast photo of {} | a low contrast photo of {} | a bright photo of {} | a dark photo of {}
        """
    ),
    "imagenet-like": _several(
        """
        a photo of {} | a good photo of {} | a bad photo of {} | a photo of {} up close | a photo of {} from far away |
        a cropped photo of {} | a bright photo of {} | a dark photo of {} | a jpeg of {} | a drawing of {} |
        a rendering of {} | {} indoors | {} outdoors | {} in an ordinary scene
        """
    ),
    # For bare class names ("cat"), which get their article here. The idea of Radford et al. 2021, section 3.1.4: eighty
    # phrasings that vary medium, quality, viewpoint, size and style; the wording is our own.
    "imagenet": _several(
        """
        a photo of a {}. | a photo of the {}. | a photo of one {}. | a photo of some {}. | a photo of my {}. |
        a snapshot of a {}. | a snapshot of the {}. | a picture of a {}. | a picture of the {}. | an image of a {}. |
        an image of the {}. | a photograph of a {}. | a photograph of several {}. | an amateur photo of a {}. |
        a professional photo of a {}. | a good photo of a {}. | a good photo of the {}. | a bad photo of a {}. |
        a bad photo of the {}. | a clear photo of a {}. | a sharp photo of a {}. | a sharp photo of the {}. |
        a blurred photo of a {}. | a blurred photo of the {}. | an out of focus photo of a {}. |
        a grainy photo of a {}. | a noisy photo of the {}. | a pixelated image of a {}. | a pixelated image of the {}. |
        a heavily compressed image of a {}. | a low resolution photo of a {}. | a low resolution photo of the {}. |
        a high resolution photo of a {}. | a thumbnail of a {}. | a bright photo of a {}. | a bright photo of the {}. |
        a dark photo of a {}. | a dark photo of the {}. | an overexposed photo of a {}. | a {} at night. |
        a {} in sunlight. | a black and white photo of a {}. | a black and white photo of the {}. |
        a colourful photo of a {}. | a faded photo of a {}. | a close-up of a {}. | a close-up of the {}. |
        a detail of a {}. | a photo of a {} from afar. | a photo of the {} from above. |
        a photo of a {} from the side. | a cropped photo of a {}. | a cropped photo of the {}. |
        a photo of part of a {}. | a photo of a {} that is hard to see. | a photo of the {} behind something. |
        a photo of a small {}. | a photo of the small {}. | a photo of a large {}. | a photo of the large {}. |
        a photo of a clean {}. | a photo of a dirty {}. | a photo of a beautiful {}. | a photo of a strange {}. |
        a photo of an old {}. | a {} indoors. | a {} outdoors. | a {} in front of a plain background. |
        a drawing of a {}. | a pencil sketch of a {}. | a child's drawing of the {}. | a painting of a {}. |
        a cartoon of a {}. | an icon of a {}. | a computer rendering of a {}. | a {} in a video game. |
        a sculpture of a {}. | a paper {}. | a toy {}. | a {} made of plastic.
        """
    ),
    # The same for photographs of a few pixels, such as those of CIFAR.
    "cifar": _several(
        """
        a photo of a {}. | a photo of the {}. | a tiny photo of a {}. | a tiny photo of the {}. |
        a small picture of a {}. | a low resolution picture of the {}. | a blurry photo of a {}. |
        a blurry photo of the {}. | a black and white photo of a {}. | a black and white photo of the {}. |
        a photo of a {} with much contrast. | a photo of the {} with little contrast. | a bright photo of a {}. |
        a dark photo of the {}. | a good photo of a {}. | a bad photo of the {}. | a photo of a large {}. |
        a photo of a small {}.
        """
    ),
}
DEFAULT_TEMPLATES = "photo"

# What ordinary images show. A concept is contrasted with these beside its own near misses, so that an image
# of something else altogether does not count as the concept only because it is no near miss either.
GENERIC_NEGATIVES: dict[int, tuple[str, ...]] = {
    1: _several(
        """
        people | an animal | a plant | food | a building | a street | a room with furniture | a vehicle | a landscape |
        clothing | an object on a table | something ordinary
        """
    )
}
GENERIC_VERSION = max(GENERIC_NEGATIVES)


def fill(template: str, phrase: str) -> str:
    """The phrase put into the template's one `{}`; never str.format, so braces in data mean nothing."""
    return template.replace("{}", phrase, 1)
