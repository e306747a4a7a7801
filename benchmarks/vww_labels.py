"""Labels of visual wake words: the classes of the 800 ImageNet evaluation photos that show a person.

ImageNet has no such labels. One labeller, an AI model, assigned them by looking at each photo at 224x224, before any
network ran on it. The rule is that of the data set on which the network was trained (Chowdhery et al. 2019, Visual Wake
Words Dataset, section 3): a photo shows a person, or a part of one such as a hand, whose bounding box covers at least
0.5 percent of the photo. Photos within the photo count. Drawings, dolls, statues, empty clothes and doubtful cases do
not.
"""

from __future__ import annotations

__all__ = ["CLASSES_WITH_PEOPLE"]

# There is one photo of each ImageNet class. Classes that are multiples of five are used for calibration and not
# labelled.
CLASSES_WITH_PEOPLE = frozenset([
    4, 34, 61, 106, 147, 156, 158, 163, 171, 183, 199, 203, 204, 217, 229, 232, 243, 257, 259, 263, 266, 333,
    344, 354, 389, 391, 394, 399, 402, 408, 411, 416, 422, 432, 433, 439, 444, 456, 457, 459, 462, 467, 472,
    477, 499, 502, 509, 516, 518, 522, 523, 537, 543, 552, 556, 558, 561, 562, 566, 568, 569, 571, 573, 578,
    582, 587, 594, 601, 602, 603, 611, 612, 614, 617, 633, 634, 639, 641, 642, 644, 652, 666, 667, 671, 673,
    677, 691, 693, 697, 699, 702, 712, 713, 732, 736, 739, 746, 754, 757, 762, 772, 774, 776, 791, 792, 793,
    797, 801, 802, 806, 814, 819, 834, 839, 841, 842, 843, 851, 853, 854, 856, 862, 871, 872, 873, 876, 879,
    882, 887, 891, 903, 906, 913, 916, 918, 924, 936, 961, 977, 981, 982, 983, 997, 998,
])  # fmt: skip
