"""CIF against pymatgen's reading: symmetry, special positions, disorder, missing types, and what is refused."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
from pymatgen.core import Structure
from pymatgen.io.cif import CifParser, CifWriter
from test_sources_support import assert_same, structures_of

from sharding.crystal import SYMBOLS, Crystal, RefusedError
from sharding.sources import ReadOptions, cif
from sharding.sources.pieces import Fault

HEAD = """data_{name}
_cell_length_a {a}
_cell_length_b {a}
_cell_length_c {a}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
{symmetry}
loop_
{tags}
{rows}
"""
FRACT = "_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z"


def text(
    rows: str,
    tags: str = "_atom_site_type_symbol\n" + FRACT,
    symmetry: str = "",
    a: str = "4.0",
    name: str = "x",
) -> str:
    return HEAD.format(rows=rows, tags=tags, symmetry=symmetry, a=a, name=name)


def read(cif_text: str | bytes, **options: Any) -> list[Crystal]:
    found = list(cif.crystals(cif_text, "key", ReadOptions(**options)))
    return [c for c in found if isinstance(c, Crystal)]


def pymatgen(cif_text: str) -> Structure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CifParser.from_str(cif_text).parse_structures(primitive=False)[0]


def without_operations(cif_text: str) -> str:
    short, n = re.subn(r"loop_\n _symmetry_equiv_pos_site_id\n _symmetry_equiv_pos_as_xyz\n(  .*\n)+", "", cif_text)
    assert n == 1
    return short


def test_symmetry(aflow: list[Crystal]) -> None:
    """Each of 60 prototypes as a CIF with symmetry: by operations, and by the name of the space group alone."""
    groups = set()
    for crystal in aflow[:240:4]:
        if len(crystal.atomic_numbers) > 48:
            continue
        species = [SYMBOLS[z] for z in crystal.atomic_numbers]
        structure = Structure(crystal.lattice, species, crystal.positions, coords_are_cartesian=True)
        full = str(CifWriter(structure, symprec=0.01))
        expected = pymatgen(full)
        assert_same(read(full)[0], expected)
        assert_same(read(without_operations(full))[0], expected, tolerance=1e-2)
        groups |= set(re.findall(r"_symmetry_Int_Tables_number +(\d+)", full))
    assert len(groups) > 20


def test_rounded_special_positions() -> None:
    """0.333 is 1/3 to the operations: no second atom beside the first, and the symmetry is exact."""
    hexagonal = """data_x
_cell_length_a 3.2
_cell_length_b 3.2
_cell_length_c 5.2
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 120
_symmetry_space_group_name_H-M 'P 63/m m c'
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Mg1 0.333 0.667 0.25
"""
    crystal = read(hexagonal)[0]
    assert len(crystal.positions) == 2
    fractional = crystal.positions @ np.linalg.inv(crystal.lattice)
    np.testing.assert_allclose(sorted(fractional[:, 0]), [1 / 3, 2 / 3], atol=1e-12)


def test_operations_are_believed_before_names() -> None:
    operations = "loop_\n_space_group_symop_operation_xyz\n'x, y, z'\n'-x,-y,-z'\n"
    crystal = read(text("Fe 0.1 0.2 0.3", symmetry="_space_group_name_H-M_alt 'F m -3 m'\n" + operations))[0]
    assert len(crystal.positions) == 2


@pytest.mark.parametrize("name", ["_space_group_name_Hall '-P 4 2 3'", "_space_group_IT_number 221"])
def test_other_names_of_space_groups(name: str) -> None:
    crystal = read(text("Cs 0 0 0\nCl 0.5 0.5 0.5", symmetry=name))[0]
    assert sorted(crystal.atomic_numbers) == [17, 55]


def test_unknown_name_goes_to_pymatgen_and_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"gemmi: .*Q 1 2 3.*pymatgen:"):
        read(text("Cs 0 0 0", symmetry="_space_group_name_H-M_alt 'Q 1 2 3'\n_cell_volume x"))


def test_whole_cell_listed_with_its_symmetry() -> None:
    rows = "Cu 0 0 0\nCu 0 0.5 0.5\nCu 0.5 0 0.5\nCu 0.5 0.5 0"
    assert len(read(text(rows, symmetry="_symmetry_space_group_name_H-M 'F m -3 m'"))[0].positions) == 4
    with pytest.raises(RefusedError, match="different elements are at one place"):
        read(text(rows.replace("Cu 0 0.5", "Au 0 0.5"), symmetry="_symmetry_space_group_name_H-M 'F m -3 m'"))


OCCUPIED = "_atom_site_type_symbol\n" + FRACT + "\n_atom_site_occupancy"


def test_disorder_is_refused_or_decided() -> None:
    rows = "Fe 0 0 0 0.4\nNi 0 0 0 0.6\nO 0.5 0.5 0.5 1.0\nH 0.5 0 0 0.3\nC 0.2 0.2 0.5 0\n"
    with pytest.raises(RefusedError, match="3 of 5 sites") as raised:
        read(text(rows, OCCUPIED))
    assert raised.value.code == "partial_occupancy"
    crystal = read(text(rows, OCCUPIED), occupancy="majority")[0]
    assert crystal.atomic_numbers.tolist() == [28, 8]  # H is more often missing than there
    # after symmetry too
    cubic = "_symmetry_space_group_name_H-M 'P m -3 m'"
    crystal = read(text("Fe 0 0 0 0.5\nNi 0 0 0 0.5\nO 0.5 0 0.5 1", OCCUPIED, cubic), occupancy="majority")[0]
    assert crystal.atomic_numbers.tolist() == [26, 8, 8, 8]


def test_of_exclusive_places_one_is_taken() -> None:
    """An atom off a mirror plane, on each side half of the time."""
    mirror = "loop_\n_symmetry_equiv_pos_as_xyz\n'x,y,z'\n'-x,y,z'\n"
    rows = "O 0.05 0.5 0.5 0.5\nFe 0.5 0 0 1"
    crystal = read(text(rows, OCCUPIED, mirror), occupancy="majority")[0]
    assert crystal.atomic_numbers.tolist() == [8, 26]


@pytest.mark.parametrize("full", ["1", "1.0", "1.00000000", "1.", "1.000(3)", "0.9999", "?", "."])
def test_full_occupancies(full: str) -> None:
    assert len(read(text(f"Fe 0 0 0 {full}\nO 0.5 0.5 0.5 1", OCCUPIED))[0].positions) == 2


@pytest.mark.parametrize("share", ["-0.5", "2.0"])
def test_impossible_occupancies(share: str) -> None:
    with pytest.raises(RefusedError, match="between 0 and 1"):
        read(text(f"Fe 0 0 0 {share}", OCCUPIED))


@pytest.mark.parametrize(
    ("symbol", "number"),
    [("Fe3+", 26), ("O2-", 8), ("Fe+3", 26), ("FE", 26), ("fe", 26), ("'Fe'", 26), ("D", 1), ("C1", 6), ("Na1+", 11)],
)
def test_type_symbols(symbol: str, number: int) -> None:
    assert read(text(f"{symbol} 0 0 0"))[0].atomic_numbers.tolist() == [number]


LABELLED = "_atom_site_label\n" + FRACT


@pytest.mark.parametrize(
    ("label", "number"), [("Ca1", 20), ("C12A", 6), ("Fe", 26), ("O_3", 8), ("H*", 1), ("CA1", 20)]
)
def test_labels(label: str, number: int) -> None:
    """A label that leaves doubt goes to pymatgen, which takes CA for calcium."""
    assert read(text(f"{label} 0 0 0", LABELLED))[0].atomic_numbers.tolist() == [number]


@pytest.mark.parametrize("symbol", ["Wat", "X", "Xx1", "M", "?"])
def test_unknown_species(symbol: str) -> None:
    with pytest.raises(RefusedError) as raised:
        read(text(f"{symbol} 0 0 0"))
    assert raised.value.code in ("species", "unparsable")


def test_uncertainties_and_cases_of_tags() -> None:
    crystal = read(text("Fe 0.250(3) -0.1 1.5", a="4.000(2)").replace("_atom_site_fract_x", "_Atom_Site_Fract_X"))[0]
    np.testing.assert_allclose(crystal.positions, [[1.0, -0.4, 6.0]])
    np.testing.assert_allclose(crystal.lattice, 4 * np.eye(3), atol=0)  # 90° is exact


def test_several_blocks() -> None:
    two = "data_global\n_audit_author_name me\n" + text("Fe 0 0 0", name="one") + text("Cu 0 0 0", name="two")
    assert [(c.key, c.atomic_numbers[0]) for c in read(two)] == [("key#one", 26), ("key#two", 29)]


def test_one_bad_block_loses_no_other() -> None:
    three = text("Fe 0 0 0", name="one") + text("Qq 0 0 0", name="two") + text("Cu 0 0 0", name="three")
    good, bad, other = cif.crystals(three, "key", ReadOptions())
    assert [good.key, other.key] == ["key#one", "key#three"]
    assert bad == Fault("block two", "species", "'Qq' is not a chemical element", "key#two")


def test_blocks_of_one_name_are_all_read() -> None:
    """As programs write them that name every structure alike."""
    two = text("Fe 0 0 0", name="VESTA_phase_1") + text("Cu 0 0 0", name="VESTA_phase_1")
    assert [(c.key, c.atomic_numbers[0]) for c in read(two)] == [
        ("key#VESTA_phase_1#0", 26),
        ("key#VESTA_phase_1#1", 29),
    ]


def test_a_block_that_breaks_the_syntax_loses_no_other() -> None:
    broken = text("Qq 0 0 0", name="two").replace("loop_", "loop_ loop_ 'never ends", 1)
    good, bad, other = cif.crystals(
        "data_global\n_audit_author_name me\n" + text("Fe 0 0 0", name="one") + broken + text("Cu 0 0 0", name="three"),
        "key",
        ReadOptions(),
    )
    assert isinstance(good, Crystal) and isinstance(other, Crystal)
    assert (good.key, good.atomic_numbers[0], other.key) == ("key#one", 26, "key#three")
    assert isinstance(bad, Fault) and bad.key == "key#two"


def test_a_name_in_another_encoding_is_no_obstacle() -> None:
    """Where pymatgen is asked, too."""
    symmetry = "_symmetry_space_group_name_H-M 'F d -3 m'\n_publ_author_name 'M\xfcller'"
    assert len(read(text("Mg1 0 0 0", LABELLED, symmetry=symmetry).encode("latin-1"))) == 1


def test_hydrogens_without_positions() -> None:
    tags = OCCUPIED.replace("_occupancy", "_attached_hydrogens")
    assert len(read(text("C 0 0 0 0\nO 0.5 0 0 ?", tags))) == 1
    with pytest.raises(RefusedError, match="without positions"):
        read(text("C 0 0 0 3\nO 0.5 0 0 0", tags))


def test_labels_are_tags() -> None:
    cif_text = text("Fe 0 0 0", symmetry="_my_energy -1.25(3)\n_my_name abc\n_my_gap ?")
    crystal = read(cif_text, labels={"e": "_my_energy", "g": "_my_gap", "m": "_missing"})[0]
    assert crystal.labels == {"e": -1.25}
    with pytest.raises(RefusedError, match="label 'n' is 'abc', which is not a number"):
        read(cif_text, labels={"n": "_my_name"})


def test_labels_are_read_where_pymatgen_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plain = cif._read_with_pymatgen
    monkeypatch.setattr(cif, "_read_with_pymatgen", lambda *args: (asked.append(args[1]), plain(*args))[1])
    tag = "_my_gap 1.1(2)"
    two_origins = text("Mg1 0 0 0", LABELLED, symmetry=f"_symmetry_space_group_name_H-M 'F d -3 m'\n{tag}")
    twice = text("Fe1 0 0 0", LABELLED, symmetry=tag).replace("_cell_length_b", "_cell_length_a 4.0\n_cell_length_b")
    for given in (two_origins, twice):
        assert read(given, labels={"gap": "_my_gap"})[0].labels == {"gap": 1.1}
    assert len(asked) == 2


def test_a_syntax_that_gemmi_refuses_is_tried_by_pymatgen() -> None:
    twice = text("Fe1 0 0 0", LABELLED).replace("_cell_length_b", "_cell_length_a 4.0\n_cell_length_b")
    assert read(twice)[0].atomic_numbers.tolist() == [26]
    latin = text("Fe 0 0 0", symmetry="_publ_author 'Müller'").encode("latin-1")
    assert read(latin)[0].atomic_numbers.tolist() == [26]


@pytest.mark.parametrize("ending", ["\n", "  \n", "\r\n"])
def test_a_name_without_its_quotes(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """As ASE wrote every CIF for years: whole databases, for which pymatgen's parser would be far too slow."""
    monkeypatch.setattr(cif, "_read_with_pymatgen", None)
    for name, atoms in (("P 1", 2), ("F m -3 m", 8)):
        symmetry = f"_symmetry_space_group_name_H-M    {name}{ending}_symmetry_int_tables_number 1"
        unquoted = text("Na 0 0 0\nCl 0.5 0.5 0.5", symmetry=symmetry.replace("number 1", "number ?"))
        for given in (unquoted, unquoted.encode()):
            assert len(read(given)[0].atomic_numbers) == atoms


@pytest.mark.parametrize(
    ("cif_text", "code"),
    [
        ("", "unparsable"),
        ("no cif at all", "unparsable"),
        ("data_x\n_cell_length_a 3\n", "unparsable"),
        (text("").replace("loop_\n_atom_site_type_symbol\n" + FRACT, ""), "no_atoms"),
        (text("Fe ? ? ?"), "unparsable"),
        (text("Fe 0 0"), "unparsable"),
        (text("Fe 0 0 0", a="0"), "singular_cell"),
        (text("Fe 0 0 0").replace("alpha 90", "alpha 181"), "singular_cell"),
        (text("Fe 0 0 0", tags="_atom_site_type_symbol\n" + FRACT.replace("fract", "Cartn")), "unparsable"),
    ],
)
def test_refused(cif_text: str, code: str) -> None:
    with pytest.raises(RefusedError) as raised:
        read(cif_text)
    assert raised.value.code == code


def test_large_texts_do_not_go_to_pymatgen() -> None:
    with pytest.raises(RefusedError, match="too long to ask"):
        read("#" * cif.SLOW_LIMIT + "\ndata_x\n_a\n")


def test_agrees_with_pymatgen_without_symmetry(aflow: list[Crystal]) -> None:
    for structure in structures_of(aflow):
        p1 = str(CifWriter(structure))
        assert_same(read(p1)[0], pymatgen(p1))
        assert_same(read(p1.encode())[0], pymatgen(p1))
