"""What the tests expect of the bundled nano that another edition of its weights may change; renew it with the weights.

Scores are not copied here: tests compute them. These are the few pictures and numbers that show that nano works.
"""

from __future__ import annotations

EDITION = "nano@3"

#: What the policy `demo` makes of sample photographs: kept, not kept, and one for the queue; and how many it keeps.
KEPT_BY_DEMO = ("chelsea.jpg", "coffee.jpg", "rotated.jpg", "cmyk.jpg")
NOT_KEPT_BY_DEMO = ("tiny.png", "chart.png")
REVIEWED_BY_DEMO = "moose.jpg"
LEAST_KEPT_BY_DEMO = 50
#: The bands of demo's rule dangerous-animal, as the pack writes them: those that a slider moves in the browser's test.
DEMO_BANDS = "    review: {above: 0.90}\n    reject: {above: 0.976}"

#: What `policy show marketplace-safety` prints of its calibrated thresholds and of how near two phrases are.
SHOWN_OF_MARKETPLACE_SAFETY = ("above 0.997", "a toy water gun 0.5")

#: Scores of the phrase "a cat": of a kitten above the first, of the Colosseum below the second.
CAT, NO_CAT = 0.8, 0.5

#: Quality on the sample photographs: least accuracy of two labels, least area under the curve of captions, least share of
#: captions that find their picture among the first ten.
LABELS_TOP1, CAPTIONS_AUC, RECALL_AT_10 = 0.8, 0.9, 0.75

#: Least cosines that int8 leaves: of any picture (nano's image tower stays float32), and the mean of texts.
INT8_IMAGES, INT8_TEXTS = 0.99999, 0.995
