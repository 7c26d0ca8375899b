"""The vocabulary of a chest film: how each finding looks, its names, and what may be denied."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["FINDINGS", "NEGATIONS", "NORMAL", "Finding"]


@dataclass(frozen=True)
class Finding:
    """One kind of finding. `{side}`, `{site}` and `{grade}` stand for the facts of a case."""

    name: str
    looks: dict[str, tuple[str, ...]]
    """Descriptions without its name, by grade; `""` where it has no grades."""
    named: tuple[str, ...]
    """Descriptions that name it."""
    impression: str
    urgency: int
    """The impression lists the most urgent first; what is below 3 is not acute."""
    sides: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    region: str = "lungs"
    """The normal statement that it contradicts."""
    denied: frozenset[str] = field(default_factory=frozenset[str])
    """The negations that it contradicts, apart from that of its own name."""


SIDES = ("left", "right")
BOTH = ("left", "right", "bilateral")
LOBES = ("upper lobe", "lower lobe")

FINDINGS: tuple[Finding, ...] = (
    Finding(
        "pleural effusion",
        {
            "small": (
                "there is blunting of the {side} costophrenic angle",
                "the {side} costophrenic sulcus is blunted",
                "minimal fluid is layering in the {side} costophrenic recess",
            ),
            "moderate": (
                "a meniscus obscures the {side} hemidiaphragm",
                "dependent fluid reaches the {side} mid lung zone",
                "homogeneous opacity with a meniscus covers the {side} base",
            ),
            "large": (
                "fluid opacifies most of the {side} hemithorax",
                "there is near complete opacification of the {side} hemithorax with a fluid level",
            ),
        },
        ("there is a {grade} {side} pleural effusion", "{grade} pleural effusion on the {side}"),
        "{grade} {side} pleural effusion",
        6,
        sides=SIDES,
        region="pleura",
    ),
    Finding(
        "pneumothorax",
        {
            "small": (
                "a thin visceral pleural line is seen at the {side} apex",
                "there is a sliver of air lateral to the {side} apical pleural line",
            ),
            "moderate": (
                "the {side} lung edge lies 3 cm from the chest wall without markings beyond it",
                "the {side} lung is partly collapsed, with lucency around it",
            ),
            "large": (
                "the {side} lung is collapsed against the hilum with surrounding lucency",
                "no lung markings are seen in most of the {side} hemithorax, which is lucent",
            ),
        },
        ("there is a {grade} {side} pneumothorax", "{side} pneumothorax, {grade}"),
        "{grade} {side} pneumothorax",
        9,
        sides=SIDES,
        region="pleura",
    ),
    Finding(
        "pneumonia",
        {
            "": (
                "there is a patchy airspace opacity in the {side} {site} with air bronchograms",
                "dense opacity fills the {side} {site} and contains air bronchograms",
                "ill-defined alveolar opacity is present in the {side} {site}",
            )
        },
        (
            "{side} {site} consolidation is seen, in keeping with pneumonia",
            "findings of pneumonia in the {side} {site}",
        ),
        "{side} {site} pneumonia",
        8,
        sides=SIDES,
        sites=LOBES,
        denied=frozenset({"consolidation"}),
    ),
    Finding(
        "atelectasis",
        {
            "mild": (
                "linear bands are seen at the {side} base",
                "there are thin plate-like opacities at the {side} base",
            ),
            "marked": (
                "there is volume loss at the {side} base with crowding of the vessels",
                "the {side} base is dense and shrunken, and the fissure is pulled down",
            ),
        },
        ("there is {grade} {side} basilar atelectasis", "{grade} atelectasis at the {side} base"),
        "{grade} {side} basilar atelectasis",
        4,
        sides=SIDES,
    ),
    Finding(
        "cardiomegaly",
        {
            "mild": (
                "the cardiac silhouette is slightly enlarged",
                "the heart is at the upper limit of normal to slightly enlarged in size",
            ),
            "marked": (
                "the cardiac silhouette is massively enlarged",
                "the cardiothoracic ratio is well above two thirds",
            ),
        },
        ("there is {grade} cardiomegaly", "{grade} cardiomegaly is noted"),
        "{grade} cardiomegaly",
        3,
        region="heart",
    ),
    Finding(
        "pulmonary edema",
        {
            "mild": (
                "the upper lobe vessels are distended and there are a few septal lines",
                "there is vascular redistribution with thin peripheral lines at both bases",
            ),
            "severe": (
                "confluent perihilar opacities spread in a bat wing pattern",
                "there are diffuse bilateral perihilar alveolar opacities with septal lines",
            ),
        },
        ("there is {grade} pulmonary edema", "findings of {grade} pulmonary edema"),
        "{grade} pulmonary edema",
        7,
        denied=frozenset({"consolidation"}),
    ),
    Finding(
        "lung nodule",
        {
            "": (
                "a round 8 mm density projects over the {side} {site}",
                "there is a well-defined rounded 1 cm opacity in the {side} {site}",
                "a coin-like density is seen within the {side} {site}",
            )
        },
        (
            "there is a noncalcified nodule in the {side} {site}",
            "{side} {site} pulmonary nodule is seen",
        ),
        "{side} {site} nodule, recommend chest CT",
        5,
        sides=SIDES,
        sites=LOBES,
    ),
    Finding(
        "emphysema",
        {
            "mild": (
                "the lungs are slightly hyperexpanded",
                "the retrosternal space is a little widened and the lungs are lucent",
            ),
            "severe": (
                "the lungs are markedly hyperinflated with flattened diaphragms and bullae",
                "flat hemidiaphragms, large retrosternal airspace and sparse vessels are seen",
            ),
        },
        ("{grade} emphysematous changes are present", "there is {grade} emphysema"),
        "{grade} emphysema",
        2,
    ),
    Finding(
        "rib fracture",
        {
            "": (
                "there is cortical discontinuity of the {side} {site} rib",
                "a step-off is seen in the lateral {side} {site} rib",
                "the {side} {site} rib shows a displaced cortical break",
            )
        },
        ("there is a fracture of the {side} {site} rib", "{side} {site} rib fracture is seen"),
        "{side} {site} rib fracture",
        6,
        sides=SIDES,
        sites=("fifth", "sixth", "seventh", "eighth"),
        region="bones",
    ),
    Finding(
        "hiatal hernia",
        {
            "small": ("a small retrocardiac air-fluid level is seen",),
            "large": (
                "a large retrocardiac air-fluid level is seen",
                "a big rounded density with gas lies behind the heart",
            ),
        },
        ("there is a {grade} hiatal hernia", "{grade} hiatal hernia is noted"),
        "{grade} hiatal hernia",
        1,
        region="mediastinum",
    ),
    Finding(
        "granuloma",
        {
            "": (
                "a small calcified density is seen in the {side} {site}",
                "there is a tiny dense calcification within the {side} {site}",
            )
        },
        ("calcified granuloma in the {side} {site}", "there is a {side} {site} granuloma"),
        "old granulomatous disease in the {side} {site}",
        1,
        sides=SIDES,
        sites=LOBES,
    ),
    Finding(
        "scoliosis",
        {
            "mild": ("the thoracic spine curves gently to the {side}",),
            "marked": (
                "there is a pronounced curvature of the thoracic spine to the {side}",
                "the thoracic spine is strongly curved, convex to the {side}",
            ),
        },
        ("there is {grade} scoliosis convex to the {side}", "{grade} {side} convex scoliosis"),
        "{grade} {side} convex thoracic scoliosis",
        1,
        sides=SIDES,
        region="bones",
    ),
    Finding(
        "compression fracture",
        {
            "mild": (
                "there is slight anterior wedging of the {site} vertebral body",
                "the {site} vertebral body has lost a little of its anterior height",
            ),
            "severe": (
                "the {site} vertebral body has lost more than half of its height",
                "{site} is flattened to a thin plate",
            ),
        },
        ("there is a {grade} {site} compression fracture",),
        "{grade} {site} compression fracture",
        4,
        sites=("T7", "T8", "T11", "T12"),
        region="bones",
    ),
    Finding(
        "elevated hemidiaphragm",
        {
            "": (
                "the {side} dome of the diaphragm stands higher than usual",
                "the {side} diaphragmatic contour is raised by several centimeters",
            )
        },
        ("there is elevation of the {side} hemidiaphragm",),
        "elevated {side} hemidiaphragm",
        2,
        sides=SIDES,
        region="diaphragm",
    ),
    Finding(
        "fibrosis",
        {
            "mild": ("fine reticular lines are seen in the {side} {site}",),
            "severe": (
                "coarse reticulation with honeycombing is present in the {side} {site}",
                "honeycomb cysts and traction changes distort the {side} {site}",
            ),
        },
        ("there is {grade} fibrosis in the {side} {site}",),
        "{grade} {side} {site} pulmonary fibrosis",
        2,
        sides=SIDES,
        sites=LOBES,
    ),
    Finding(
        "lymphadenopathy",
        {
            "": (
                "{side} hilar fullness with a lobulated contour is seen",
                "there is {side} lobular hilar enlargement",
            )
        },
        ("{side} hilar lymphadenopathy is present", "enlarged {side} hilar lymph nodes are seen"),
        "{side} hilar lymphadenopathy",
        5,
        sides=BOTH,
        region="mediastinum",
    ),
)
"""Every finding, with the words that a report uses for it."""

NEGATIONS: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (
        frozenset({"pneumothorax"}),
        ("no pneumothorax", "there is no pneumothorax", "negative for pneumothorax"),
    ),
    (
        frozenset({"pleural effusion"}),
        ("no pleural effusion", "no large effusion is identified", "without pleural effusion"),
    ),
    (
        frozenset({"pleural effusion", "pneumothorax"}),
        (
            "no pleural effusion or pneumothorax",
            "there is neither pneumothorax nor pleural effusion",
            "no evidence of pneumothorax or effusion",
        ),
    ),
    (
        frozenset({"consolidation"}),
        (
            "no focal consolidation",
            "there is no focal airspace disease",
            "no lobar consolidation is seen",
        ),
    ),
    (
        frozenset({"pulmonary edema"}),
        ("no pulmonary edema", "there is no vascular congestion", "no overt edema"),
    ),
    (
        frozenset({"rib fracture"}),
        ("no displaced rib fracture", "no acute rib fracture is identified"),
    ),
    (
        frozenset({"lung nodule", "granuloma"}),
        ("no suspicious nodule", "no pulmonary nodule or mass is seen"),
    ),
)
"""Statements of absence, with the findings that contradict them."""

NORMAL: dict[str, tuple[str, ...]] = {
    "heart": (
        "the heart is normal in size",
        "heart size is within normal limits",
        "the cardiac silhouette is not enlarged",
        "normal heart size",
    ),
    "lungs": (
        "the lungs are clear",
        "both lungs are clear and well expanded",
        "lungs are clear without focal airspace disease",
        "the lung fields are clear bilaterally",
    ),
    "mediastinum": (
        "the mediastinal contours are normal",
        "mediastinum is unremarkable",
        "the mediastinal and hilar contours are within normal limits",
    ),
    "bones": (
        "the osseous structures are intact",
        "the bony thorax is unremarkable",
        "no acute bony abnormality",
    ),
    "pleura": (
        "the costophrenic angles are sharp",
        "the pleural spaces are clear",
        "both costophrenic sulci are sharp",
    ),
    "diaphragm": (
        "the hemidiaphragms are smooth",
        "diaphragmatic contours are normal",
    ),
}
"""Statements about a region without findings."""
