"""Writes train.jsonl and test.jsonl beside this file: sentences of contracts and resumes with parties, companies, job
titles, dates and amounts marked.

    python examples/entities/make.py

No sentence pattern and no name of the test set occurs in the training set. The same Python gives the same bytes.
"""

import json
import pathlib
import random
import re

SURNAMES = """Abbott Achebe Aldous Amari Anders Bakker Barlow Beaumont Bianchi Bosch Brandt Calder Castellan Chen Corrigan
Dahl Davenport Delacroix Dufour Eklund Ellery Farrow Ferrante Fitzgerald Gallo Garrick Grieg Haddad Hale Hargrove Harlow
Hashimoto Ibsen Ingram Jansen Jarvis Kowalski Krueger Lachance Lindqvist Lockhart Mahoney Marchetti Mbeki Merrick Nakamura
Navarro Novak Okafor Oakes Osborne Paget Petrov Quigley Radcliffe Ramanujan Reyes Rousseau Sandoval Satō Schaefer Sinclair
Sorensen Tanaka Tavares Thackeray Ueda Underhill Valdez Van-Dijk Vasquez Wainwright Weiss Whitlock Yilmaz Zhang""".split()
PLACES = """Aberdeen Antwerp Bergen Bologna Bristol Cardiff Cork Danube Dover Fjordland Galway Ghent Halifax Innsbruck Jutland
Kalmar Leith Lisbon Malmö Meridian Nantes Northgate Odense Perth Porto Riverside Salford Severn Solway Tagus Thornbury
Trieste Tyne Uppsala Westmoor Zürich""".split()
TRADES = """Aggregates|Analytics|Bakeries|Biologics|Bottling|Brokerage|Capital|Carpets|Catering|Ceramics|Chemicals|Cold Storage|
Consulting|Dairies|Data Systems|Diagnostics|Energy|Engineering|Ferries|Fisheries|Foods|Foundry|Freight|Glassworks|Granaries|
Health|Holdings|Homes|Instruments|Insurance|Joinery|Laboratories|Leasing|Lifts|Logistics|Media|Mills|Motors|Optics|Packaging|
Paper|Partners|Pharma|Plastics|Ports|Properties|Publishing|Quarries|Rail|Robotics|Sawmills|Security|Semiconductors|Shipping|
Software|Steel|Studios|Telecom|Textiles|Timber|Tooling|Ventures|Vineyards|Water|Wind""".replace("\n", "").split("|")
COINED = """Acuvanta Bellcore Brightloom Cindral Corvex Dynaform Everstead Fennix Glimmerly Hexaport Ironquay Joltware Kestrelo
Lumenza Marquelle Nimbrix Opalane Plinthe Quantora Ravensoft Solvanti Tidewell Umbrascan Verdanta Wexline Xylona Yondro
Zephyrax""".split()
SUFFIXES = ["Ltd", "Limited", "plc", "LLP", "Inc.", "GmbH", "B.V.", "S.p.A.", "AB", "LLC", "& Co.", "Corporation", "Group"]
TITLES = """account manager|actuary|anaesthetist|assistant buyer|assistant controller|backend developer|brand manager|bus driver|
business analyst|care assistant|chief executive|chief financial officer|chief of staff|chief technology officer|claims handler|
commercial director|compliance officer|copy editor|data engineer|data scientist|deputy head of legal|design lead|
director of operations|dispatcher|electrician|estate manager|export clerk|finance director|fleet manager|forklift operator|
front desk supervisor|general counsel|graphic designer|head chef|head of procurement|head of people|human resources officer|
interim managing director|junior accountant|laboratory technician|lead auditor|legal secretary|machine learning engineer|
maintenance planner|managing director|marketing executive|mechanical engineer|night shift supervisor|office manager|
operations analyst|paralegal|payroll specialist|physiotherapist|plant manager|portfolio manager|principal architect|
procurement lead|product owner|production planner|project coordinator|quality inspector|regional sales manager|
research fellow|risk analyst|sales assistant|scrum master|senior associate|senior project manager|senior software engineer|
site reliability engineer|social media manager|solicitor|staff nurse|store manager|supply chain analyst|tax adviser|
technical writer|trainee solicitor|treasury analyst|vice president of sales|warehouse operative|web developer|
welding foreman""".replace("\n", "").split("|")
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "two three four five six seven eight nine ten twelve fourteen fifteen twenty thirty forty sixty ninety".split()
SKILLS = """double-entry bookkeeping|Python and SQL|stakeholder workshops|lean manufacturing|bid writing|contract drafting|
stock control|spoken German|AutoCAD|first aid|budget forecasting|customer onboarding|press relations|welding to EN 287|
phlebotomy|route planning|Kubernetes|month-end close|negotiation|typesetting""".replace("\n", "").split("|")
GOODS = """the pumps|the Licensed Software|the harvested grapes|the warehouse at Unit 4|the vessel|the machinery|the drawings|
the refrigerated trailers|the Services|the archive|the patented valve|the catering equipment|the Premises|the data feed|
the moulds|the seed stock|the lifts|the uniforms""".replace("\n", "").split("|")

# Patterns: {p} a party, {c} a company, {t} a job title, {d} a date, {a} an amount. {n}, {N}, {g}, {s}, {%} and {r} are a small
# number in words, one in digits, goods, a skill, a percentage and a clause: they are what nothing is to be marked in.
CONTRACTS = """
This Agreement is made on {d} between {p} (the Supplier) and {p} (the Customer).
{p} shall pay {p} {a} for {g}, payable within {n} days of invoice.
The Lessee, {p}, shall pay a yearly rent of {a}, reviewed on {d} and every {n} years thereafter.
Subject to clause {r}, the total liability of {p} shall not exceed {a}.
{p} hereby assigns to {p} all rights in {g} with effect from {d}.
Either party may terminate on {n} months' notice, but not before {d}.
The Purchaser shall deposit {a} with {p} as escrow agent no later than {d}.
If delivery of {g} is late by more than {n} days, the Seller shall credit {a} for each week of delay.
Interest accrues at {%} a year on any sum above {a} that is unpaid on {d}.
Notices to {p} shall be marked for the attention of its {t}.
The {t} of {p} shall certify the accounts by {d} in each year of the Term.
In consideration of {a}, {p} grants an option over {g} that lapses on {d}.
{p} warrants that {g} will conform to the Specification for {n} years from {d}.
Neither {p} nor {p} shall disclose Confidential Information, whether before or after {d}.
The fee is {a} for up to {N} users and {a} for each further block of {N} users.
This lease, dated {d}, replaces the one granted by {p} in its entirety.
{p} shall maintain insurance of at least {a} for any one claim.
The guarantee given by {p} expires on {d} or on payment of {a}, whichever comes first.
Clause {r} survives termination for {n} years.
All disputes under clause {r} go to arbitration before {n} arbitrators in Geneva.
The Contractor shall complete {g} in {N} stages, each signed off by the {t}.
A retention of {%} is released once {p} has inspected {g}.
On {d} the Borrower drew down {a} from {p} under the Facility.
{p}, acting through its {t}, accepts the novation from {p}.
The parties agree that {a} is a genuine estimate of the loss of {p}.
Should {p} become insolvent, {p} may retake {g} without notice.
The price of {a} excludes duties and assumes delivery before {d}.
Rent for the period from {d} to {d} is {a} and falls due in advance.
No amendment binds {p} unless signed by its {t}.
The Client may withhold {a} until {g} passes the tests in Schedule {N}.
Payment of {a} was received from {p} on {d} and is acknowledged.
{p} appoints {p} as exclusive distributor of {g} until {d}.
The annual cap of {a} rises by {%} on {d}.
Save as set out in clause {r}, {p} gives no warranty as to {g}.
The Buyer shall reimburse {p} for freight up to {a} per container of {N} pallets.
Completion takes place at the offices of {p} on {d} at {N} o'clock.
As of {d}, {p} holds {N} shares and owes {a} in unpaid calls.
{p} is a company registered in Norway and is referred to below as the Carrier.
The loan bears no interest if {a} is repaid by {d}; otherwise {%} applies.
In the event of damage to {g}, {p} bears the first {a} of the loss.
The deed was executed on {d} by the {t} of {p}.
Fees above {a} need the written consent of {p}.
Within {n} working days of {d}, {p} shall hand over {g}.
{p} and {p} have settled all claims for {a}.
"""
RESUMES = """
{t} at {c} from {d} to {d}, leading a team of {N}.
I joined {c} as {t} in {d} and was promoted to {t} within {n} years.
Since {d} I have worked for {c}, where my main tools are {s}.
{c}: {t}. Responsible for {s} and for a budget of {a}.
Cut annual costs at {c} by {a} through better {s}.
Started my career as {t} with {c} before moving to {c}.
Skills: {s}; {s}; {n} years of customer contact.
As {t} I reported to the {t} and closed deals worth {a}.
{d} to {d}: {t}, {c}.
Awarded employee of the year by {c} in {d}.
Managed {N} suppliers for {c}, saving {a} in the first year.
My last salary as {t} was {a}.
Completed a certificate in {s} on {d}.
Promoted from {t} to {t} after the merger with {c}.
Before {c} was sold in {d}, I ran its {s} programme.
References: the {t} of {c} can be contacted after {d}.
Volunteer {t} at weekends; trained {N} people in {s}.
Looking for a post as {t}, ideally near the coast.
Raised {a} in sponsorship for a charity run organised by {c}.
{c} hired me in {d} to rebuild its {s} practice from nothing.
Acting {t} for {n} months while the {t} was on leave.
Left {c} on {d} by mutual agreement.
Increased turnover from {a} to {a} as {t} of a family firm.
Fluent in {s}, with {n} years at {c}.
Contract roles for {c} and {c}, mostly in {s}.
"""
TEST_CONTRACTS = """
By an instrument dated {d}, {p} let {g} to {p}.
The Hirer, {p}, owes {p} the sum of {a}.
{p} undertakes to {p} that {g} will be ready by {d}.
A penalty of {a} falls due if clause {r} is breached after {d}.
The Vendor received {a} on signing and {a} on {d}.
This deed is signed for {p} by its {t}.
Liability for {g} is capped at {a}, being {%} of the Price.
After {d}, only the {t} of {p} may vary Schedule {N}.
It is agreed by {p} that the term of {n} years ends on {d}.
{p} sold {g} to {p} for {a}.
The sum of {a} shall be held by {p} for {n} days.
Force majeure excuses {p} for no more than {n} weeks under clause {r}.
Upon payment of {a}, title to {g} passes from {p}.
{p} may inspect {g} on {n} days' notice until {d}.
The minimum order is {N} units or {a}, whichever is greater.
"""
TEST_RESUMES = """
Worked as {t} at {c} until {d}.
In {d} I became {t} of {c}, with {N} direct reports.
{c} employed me for {n} years, lastly as {t}.
Saved {c} roughly {a} by introducing {s}.
Employer: {c}. Position: {t}. Period: {d} to {d}.
Hired by {c} to teach {s} to {N} apprentices.
Applied for the role of {t} because of my background in {s}.
Handled invoices of up to {a} for the {t}.
Moved from {c} to {c} in {d} as {t}.
Interned with {c}; supported the {t} with {s}.
"""


def split(names):
    """(for training, for the test): every third is kept for the test."""
    return [n for i, n in enumerate(names) if i % 3], names[::3]


class Writer:
    """Fills patterns from one part of the lists."""

    def __init__(self, part, seed):
        self.random = random.Random(seed)
        self.lists = {
            name: split([x.strip() for x in values if x.strip()])[part]
            for name, values in {
                "surname": SURNAMES, "place": PLACES, "trade": TRADES, "coined": COINED, "title": TITLES, "skill": SKILLS, "goods": GOODS,
            }.items()
        }

    def pick(self, name):
        return self.random.choice(self.lists[name])

    def company(self):
        suffix = self.random.choice(SUFFIXES)
        kind = self.random.randrange(6)
        if kind == 0:
            return f"{self.pick('surname')} {self.pick('trade')} {suffix}"
        if kind == 1:
            return f"{self.pick('surname')} & {self.pick('surname')}"
        if kind == 2:
            return f"{self.pick('place')} {self.pick('trade')} {suffix}"
        if kind == 3:
            return f"{self.pick('coined')} {suffix}"
        if kind == 4:
            return self.pick("coined")
        return f"{self.pick('place')} {self.pick('trade')}"

    def date(self):
        r = self.random
        day, month, year = r.randrange(1, 29), r.randrange(12), r.randrange(1996, 2031)
        ordinal = f"{day}{'st' if day in (1, 21) else 'nd' if day in (2, 22) else 'rd' if day in (3, 23) else 'th'}"
        return r.choice([
            f"{day} {MONTHS[month]} {year}",
            f"{MONTHS[month]} {day}, {year}",
            f"{MONTHS[month]} {year}",
            f"{year}-{month + 1:02}-{day:02}",
            f"{day:02}/{month + 1:02}/{year}",
            f"the {ordinal} of {MONTHS[month]} {year}",
            f"{MONTHS[month][:3]} {year}",
            f"{year}",
        ])

    def amount(self):
        r = self.random
        n = r.choice([r.randrange(50, 1000), 1000 * r.randrange(1, 1000), 250 * r.randrange(4, 400)])
        return r.choice([
            f"EUR {n:,}",
            f"${n:,}",
            f"£{n:,}.00",
            f"{n:,} euros",
            f"USD {n:,}",
            f"{r.choice(NUMBERS)} thousand pounds",
            f"€{r.randrange(1, 40)}.{r.randrange(1, 10)} million",
            f"{n} Swiss francs",
        ])

    def title(self):
        title = self.pick("title")
        return self.random.choice([title, title, title.title(), title.capitalize()])

    def slot(self, key):
        r = self.random
        labels = {"p": ("party", self.company), "c": ("company", self.company), "t": ("title", self.title),
                  "d": ("date", self.date), "a": ("amount", self.amount)}
        if key in labels:
            label, make = labels[key]
            return make(), label
        plain = {
            "n": lambda: r.choice(NUMBERS), "N": lambda: str(r.randrange(2, 60)), "g": lambda: self.pick("goods"),
            "s": lambda: self.pick("skill"), "%": lambda: r.choice([f"{r.randrange(1, 19)} %", f"{r.randrange(1, 9)}.5 per cent"]),
            "r": lambda: f"{r.randrange(1, 30)}.{r.randrange(1, 9)}",
        }
        return plain[key](), None

    def row(self, pattern):
        text, entities = "", []
        for piece in re.split(r"(\{.\})", pattern):
            if not re.fullmatch(r"\{.\}", piece):
                text += piece
                continue
            filled, label = self.slot(piece[1])
            if not text:
                filled = filled[0].upper() + filled[1:]
            if label:
                entities.append({"start": len(text), "end": len(text) + len(filled), "label": label})
            text += filled
        return {"text": text, "entities": entities}

    def rows(self, patterns, each):
        rows = [self.row(pattern) for pattern in patterns.strip().splitlines() for _ in range(each)]
        self.random.shuffle(rows)
        return rows


def write(name, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (pathlib.Path(__file__).parent / name).write_text(lines, encoding="utf-8")
    print(name, len(rows), "rows,", sum(len(row["entities"]) for row in rows), "entities")


if __name__ == "__main__":
    write("train.jsonl", Writer(0, 1).rows(CONTRACTS + RESUMES.strip(), 6))
    write("test.jsonl", Writer(1, 2).rows(TEST_CONTRACTS + TEST_RESUMES.strip(), 8))
