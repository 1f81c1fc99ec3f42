"""Traces without a model: random arrays of the right shapes, for tests of what shows them."""

import numpy as np

from stable_diffusion.explain.boxes import Box
from stable_diffusion.explain.trace import Step, Token, Trace
from stable_diffusion.noise_scheduler import NoiseScheduler, diffuse

END = 49407


def make_trace(
    words=("red", "apple"),
    num_steps=3,
    size=64,
    latent=(8, 8, 4),
    context=(77, 16),
    guided=True,
    from_image=False,
    checkpoint="few",
    negative_prompt="",
):
    """Returns a `Trace` of random numbers.

    Args:
        words: of the prompt, each of one token.
        num_steps, size, checkpoint, negative_prompt: as in a trace; the image is square.
        latent, context: shapes.
        guided: whether there is guidance.
        from_image: whether it is of image to image, which leaves the first step out.
    """
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.standard_normal(shape).astype("float32")

    def paint(size=size):
        return random.integers(0, 256, (size, size, 3)).astype("uint8")

    tokens = [Token(END - 1, "<|startoftext|>", "start")]
    tokens += [Token(300 + n, word, "text", True, word) for n, word in enumerate(words)]
    tokens.append(Token(END, "<|endoftext|>", "end"))
    tokens += [Token(END, "<|endoftext|>", "padding")] * (context[0] - len(tokens))
    schedule = NoiseScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    levels, steps, x0, noise = schedule.levels(num_steps), [], draw(*latent), draw(*latent)
    for number in range(int(from_image), num_steps):
        (timestep, alpha), (_, alpha_next) = levels[number : number + 2]
        before, after = diffuse(x0, noise, alpha), diffuse(x0, noise, alpha_next)
        heat = {word: random.random(latent[:2]).astype("float32") for word in words}
        without = noise - 0.01 * draw(*latent) if guided else None
        steps.append(
            Step(
                number,
                timestep,
                alpha,
                alpha_next,
                before.astype("float32"),
                after.astype("float32"),
                x0,
                paint(),
                noise,
                without,
                noise,
                heat,
            )
        )
    stages = {"mid_res_1": draw(*latent[:2], 6), "up_0_res_1": draw(size, size, 5)}
    boxes = [
        Box("encode", "tokenizer", "Turns text into ids.", "text", "(77,)", "a/b.py:12"),
        Box("conv_in", "diffusion_model", "Convolves.", str(latent), "(8, 8, 16)", "a/c.py:3"),
        Box("mid_res_0", "diffusion_model", "Mixes.", "(8, 8, 16)", "(4, 4, 32)", "a/d.py:5"),
        Box("up_0_res_1", "decoder", "Paints.", "(8, 8, 16)", "(512, 512, 5)", "a/e.py:7"),
    ]
    return Trace(
        prompt=" ".join(words),
        negative_prompt=negative_prompt,
        seed=7,
        num_steps=num_steps,
        scale=3.0 if guided else 1.0,
        sampler="ddim",
        checkpoint=checkpoint,
        image_size=(size, size),
        tokens=tokens,
        context=draw(*context),
        negative_context=draw(*context) if guided else None,
        given=paint() if from_image else None,
        given_latent=x0 if from_image else None,
        noise=noise,
        start=steps[0].before,
        steps=steps,
        guidance={1.0: paint(), 3.0: paint(), 7.5: paint()},
        stages=stages,
        image=paint(),
        maps={word: random.random((size, size)).astype("float32") for word in words},
        alphas_cumprod=schedule.alphas_cumprod,
        prediction_type="epsilon",
        boxes=boxes,
        seconds=2.5,
    )
