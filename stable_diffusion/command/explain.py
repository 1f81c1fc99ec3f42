"""The command `stable-diffusion-explain`: a web page that shows how an image came to be."""

import sys
import time
from pathlib import Path

from stable_diffusion.command.arguments import (
    SEEDS,
    Parser,
    add_checkpoint_options,
    add_sampling_options,
    make_number_type,
    parse_text,
)
from stable_diffusion.command.generate import STEPS, Job, make_folder, open_model
from stable_diffusion.command.terminal import print_message, run_command, show_progress
from stable_diffusion.replacing import check_output

NAME = "stable-diffusion-explain"
USAGE = f'{NAME} "PROMPT" --out FOLDER [options]'
DESCRIPTION = """\
Generates one image, and writes a web page that explains how: FOLDER/index.html. It shows the
tokens, the context, the noise, every step, guidance, where the image looks at each word, and the
decoder. The page is one file under 5 MB, which needs no network. Its path is printed to standard
output, everything else to standard error.
"""
EPILOG = """\
The UNet runs layer by layer, so that its attention can be seen: with the emoji that come with the
package in a few seconds, with Stable Diffusion on a CPU in many minutes. The command says how long
it will take once the first steps are done. The image is generated with guidance of 1, 3 and 7.5
too. Checkpoints for OpenVINO can't be looked into.

examples:
  stable-diffusion-explain "a red apple on a blue background" --out apple
  stable-diffusion-explain "a dog face on green" --image cat.png --strength 0.7 --out dog
  stable-diffusion-explain "an astronaut" --weights sd1.4 --steps 20 --out astronaut

exit status: 0 done, 1 failed, 2 arguments or files that cannot be used,
130 interrupted, 143 ended by SIGTERM
"""
LONG = 60  # seconds: if it takes longer, this is told
TIMED_STEPS = 3  # of which the first one traces and is not counted


def get_parser():
    """Returns the parser of the command line."""
    parser = Parser(NAME, usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", type=parse_text, help="what to show, in quotes")
    add("--out", metavar="FOLDER", required=True, type=parse_text, help="where the page goes")
    add("--negative", metavar="TEXT", default="", type=parse_text, help="what not to show")
    add(
        "--weights",
        metavar="W",
        default="emoji",
        type=parse_text,
        help="default: emoji; as of stable-diffusion",
    )
    add_checkpoint_options(parser)
    add(
        "--seed",
        metavar="S",
        default=0,
        type=make_number_type(int, 0, SEEDS - 1),
        help="default: 0",
    )
    add_sampling_options(add)
    add("--image", metavar="FILE", type=parse_text, help="an image to start from")
    add(
        "--strength",
        metavar="S",
        type=make_number_type(float, 0, 1),
        help="share of the steps that is taken from --image on (default: 0.8)",
    )
    parser.set_defaults(jit=False, redo=None, eta=None)  # which `open_model` asks for
    return parser


class Clock:
    """Shows how many steps are done, and tells once if all will take long.

    A step of the other guidance scales takes less time than those before, so it may be earlier.
    """

    def __init__(self):
        self.start = None

    def show(self, done, total):
        """Is called after each step."""
        now = time.monotonic()
        if done == 1:
            self.start = now
        elif done == TIMED_STEPS:
            seconds = (now - self.start) / (TIMED_STEPS - 1) * (total - done)
            if seconds > LONG:
                print_message(NAME, f"it will take about {-(-seconds // 60):.0f} minutes more")
        show_progress(f"step {done} of {total} ")


def explain_image(args):
    """Generates the image that the arguments ask for, and writes its page."""
    folder = Path(args.out)
    if folder.is_file():
        raise ValueError(f"argument --out: it is a folder, not the file {args.out!r}")
    job = Job(args.prompt, args.negative, args.seed, folder, args.image, args.strength)
    job.check(args.steps or STEPS)
    with make_folder(folder):
        page = folder / "index.html"
        check_output(page)
        model, own = open_model(args)
        from stable_diffusion.explain.page import write_page
        from stable_diffusion.explain.trace import trace

        given = {"image": job.image, "strength": job.strength} if job.image else {}
        made = trace(
            model,
            args.prompt,
            args.negative,
            args.seed,
            args.steps,
            args.guidance,
            progress=Clock().show,
            sampler=args.sampler,
            spacing=args.spacing,
            prompt_syntax=args.syntax,
            clip_skip=args.clip_skip,
            noise_source=args.noise_source,
            guidance_rescale=args.guidance_rescale or 0.0,
            **given,
            **own,
        )
        show_progress("writing the page ...")
        write_page(made, page)
        show_progress("")
        print(page)


def main(argv: list[str] | None = None) -> int:
    """Runs the command with `argv`, or this process's arguments; returns its exit status."""

    def work(argv):
        explain_image(get_parser().parse_args(argv))

    return run_command(NAME, work, argv)


if __name__ == "__main__":
    sys.exit(main())
