"""What training did to a model's sentences about films, by judges that are not its reward.

    python data/films/measure.py out/films/sft out/films/ppo [--prompts FILE] [--seed 1] [--out FILE.json]

Every model continues the held-out prompts. Of the answers this prints, with 95 % intervals over prompts:

    positive, negative    the share that VADER's lexicon finds so (Hutto and Gilbert 2014: compound beyond 0.05, -0.05)
    about_films           the share with a word of FILM_WORDS. A policy that left the films for restaurants lacks them
    perplexity            of held-out sentences that people wrote
    perplexity_plain      of everyday sentences that are about no film: data/films/plain.txt
    and length in tokens, eos_rate (ended by itself), distinct_2 (different pairs of tokens)

Lengths, temperature and stop are those of the last PPO run among the models.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from data.films.lexicon import compound, ratings
from minirlhf.assess import measure_model, perplexity, print_figures
from minirlhf.data import Example, Row, read_demonstrations, read_prompts
from minirlhf.files.errors import run_main
from minirlhf.files.json_files import write_json
from minirlhf.files.tokenizer import load_tokenizer
from minirlhf.running.config import Parser
from minirlhf.running.device import pick_device
from minirlhf.stats import plain
from minirlhf.tools.evaluate.report import sampling_of
from minirlhf.weights import from_pretrained

BOUND = 0.05                            # of the compound, beyond which a text is positive or negative
FILM_WORDS = frozenset(
    "acted acting actor actors actress actresses adaptation animated animation audience audiences biopic blockbuster "
    "cast casting cgi characters cinema cinematic cinematography comedies comedy dialogue directed directing "
    "direction director directorial directors documentaries documentary drama dramas ensemble epic filmed filmmaker "
    "filmmakers filmmaking films film flick flicks footage franchise genre hollywood horror melodrama movie "
    "moviegoers moviemaking movies performance performances plot plots premise protagonist remake romance satire "
    "scene scenes screen screenplay screenwriter script scripted sequel sequels slasher soundtrack starring storyline "
    "storytelling suspense thriller thrillers viewer viewers villain".split())


def about_films(text):
    return not FILM_WORDS.isdisjoint(re.findall("[a-z]+", text.lower()))


def film_facts(prompts, texts, rated=None):
    """What can be counted in answers: {name: a value of each}."""
    compounds = [compound(text, rated or ratings()) for text in texts]
    return {"positive": [value >= BOUND for value in compounds], "negative": [value <= -BOUND for value in compounds],
            "compound": compounds, "about_films": list(map(about_films, texts))}


def plain_examples(tokenizer):
    """Everyday sentences without an EOS. Nothing predicts the first word, so it is the prompt."""
    examples = []
    for number, line in enumerate((HERE / "plain.txt").read_text().splitlines(), start=1):
        first, rest = re.fullmatch(r"(\w+)(.+)", line).groups()
        row = Row(f"plain.txt:{number}", line, (rest,))         # each sentence counts, also with the same first word
        examples.append(Example(row, tokenizer.encode_ordinary(first), [tokenizer.encode_ordinary(rest)]))
    return examples


def measure(name, rows, human, sampling, device):
    """{figure: Estimate} of a model folder."""
    model, tokenizer = from_pretrained(name).to(device).eval(), load_tokenizer(name)
    tokenizer.template = None                   # the prompts are exact text, also for a chat model
    figures = measure_model(name, model, tokenizer, rows, sampling, human, film_facts)[2]
    return figures | {"perplexity_plain": perplexity(model, plain_examples(tokenizer))}


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="+", help="model folders")
    parser.add_argument("--prompts", type=Path, default=Path("out/data/films/prompts_test.jsonl"),
                        help="held-out prompts, beside demonstrations_test.jsonl [%(default)s]")
    for name, kind in (("max_response", int), ("temperature", float), ("stop", str)):
        parser.add_argument(f"--{name}", type=kind, help="[as the last PPO run here]")
    parser.add_argument("--seed", type=int, default=1, help="seed of the answers [1]")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures there")
    parser.set_defaults(drop_long=False)
    args = parser.parse_args(argv)
    rows, human = read_prompts(args.prompts), read_demonstrations(args.prompts.with_name("demonstrations_test.jsonl"))
    columns = {name: measure(name, rows, human, sampling_of(args), pick_device("")) for name in args.models}
    print_figures(f"{len(rows)} held-out prompts about films, 95 % intervals", columns)
    if args.out:
        write_json(args.out, plain(columns))


if __name__ == "__main__":
    run_main(main)
