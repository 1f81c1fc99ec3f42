"""Solutions of lesson 5."""


def take_step(x0, noise, alpha_next):
    return alpha_next**0.5 * x0 + (1 - alpha_next) ** 0.5 * noise


def sample(predict, latent, levels):
    for (t, alpha), (_, alpha_next) in zip(levels, levels[1:], strict=False):
        x0, noise = predict(latent, t, alpha)
        latent = take_step(x0, noise, alpha_next)
    return latent


def find_sigma(alpha, alpha_next, eta):
    return eta * ((1 - alpha_next) / (1 - alpha)) ** 0.5 * (1 - alpha / alpha_next) ** 0.5
