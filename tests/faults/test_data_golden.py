"""Row 58: a library whose update changes a score is noticed: 20 fixed pairs, their WER and BLEU to the last digit."""

from __future__ import annotations

import sacrebleu

from speechllm_prune.evaluation.scoring import score_bleu, score_wer

PAIRS = [
    ("HE HOPED THERE WOULD BE STEW FOR DINNER", "he hoped there would be stew for dinner"),
    ("TURNIPS AND CARROTS AND BRUISED POTATOES", "turnips and carrot and bruised potatoes"),
    ("STUFF IT INTO YOU HIS BELLY COUNSELLED HIM", "stuff it into you his belly counseled him"),
    ("AFTER EARLY NIGHTFALL THE YELLOW LAMPS", "after early night fall the yellow lamps"),
    ("HELLO BERTIE ANY GOOD IN YOUR MIND", "hello bertie any good in your mind"),
    ("NUMBER TEN FRESH NELLY IS WAITING ON YOU", "number 10 fresh nelly is waiting on you"),
    ("MISTER QUILTER IS THE APOSTLE", "mr. quilter is the apostle"),
    ("IT'S ALL RIGHT SAID THE DOCTOR", "it is alright said the doctor"),
    ("TWENTY FIVE DOLLARS", "$25"),
    ("SHE SANG UM TWO SONGS", "she sang two songs"),
    ("THE COLOUR OF THE HARBOUR", "the color of the harbor"),
    ("WE'VE BEEN THERE", "we have been there"),
    ("A CAFÉ IN THE TOWN", "a cafe in town"),
    ("NOBODY ANSWERED", ""),
    ("NO", "no no no no"),
    ("IN NINETEEN NINETY NINE", "in 1999"),
    ("THE FIRST OF MAY", "the 1st of may"),
    ("THREE HUNDRED AND SIXTY DAYS", "360 days"),
    ("WELL-KNOWN TO ALL", "well known to all"),
    ("GOOD NIGHT HUSBAND", "good knight husband"),
]

TRANSLATIONS = [
    ("Das alte Haus steht am Rand der Stadt.", "Das alte Haus steht am Rande der Stadt."),
    ("Sie kauft sieben grüne Kisten.", "Sie kauft sieben grüne Kisten."),
    ("„Komm herein“, sagte er.", '"Komm herein", sagte er.'),
    ("Es kostet 3,50 €.", "Es kostet 3.50 €."),
    ("Wo ist der Bahnhof?", "Wo ist der Bahnhof"),
    ("Der Hund schläft.", "der hund schläft."),
    ("Ich habe keine Zeit, tut mir leid.", "Ich habe leider keine Zeit."),
    ("Die Straße ist gesperrt.", "Die Strasse ist gesperrt."),
    ("Er kam, sah und siegte.", "Er kam, sah und siegte."),
    ("Morgen früh um sechs.", "Morgen um sechs Uhr früh."),
    ("Niemand antwortete.", ""),
    ("Das ist gut!", "Das ist gut!"),
    ("Wir gehen ins Kino.", "Wir gehen in das Kino."),
    ("Am 3. Mai 1999 regnete es.", "Am 3. Mai 1999 hat es geregnet."),
    ("Kannst du mir helfen?", "Können Sie mir helfen?"),
    ("E-Mail an alle", "E-Mail an alle"),
    ("Der Zug fährt um 8:15 ab.", "Der Zug fährt um 8:15 Uhr ab."),
    ("Ja.", "Ja, ja, ja."),
    ("Sie wohnt in Köln-Deutz.", "Sie wohnt in Köln Deutz."),
    ("Gute Nacht", "Gute Nacht"),
]


def test_row_58_wer_of_twenty_fixed_pairs() -> None:
    refs, hyps = zip(*PAIRS, strict=True)
    counts = score_wer([str(n) for n in range(20)], refs, hyps)
    total = counts.total
    assert (total.substitutions, total.deletions, total.insertions) == (4, 4, 4)
    assert total.reference_words == 92 and f"{counts.wer:.6f}" == "13.043478"
    assert [row.errors for row in counts.rows] == [0, 1, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0, 1, 2, 3] + [
        0
    ] * 4 + [1]


def test_row_58_bleu_of_twenty_fixed_pairs() -> None:
    found = score_bleu([ref for ref, _ in TRANSLATIONS], [hyp for _, hyp in TRANSLATIONS], "de")
    assert f"{found.bleu:.6f}" == "50.284914"
    signature = f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert found.signature == signature
