"""The built-in drawn faces: something to train on where there is no CelebA yet."""

import numpy as np


def draw_face(index, size):
    """Draw face number `index`: (size, size, 3) uint8, the same on every machine.

    Soft-edged ellipses over each other, with a light from one side; pose, proportions and colours vary.
    """
    random = np.random.RandomState(index)  # its stream is frozen by NumPy's policy, unlike default_rng's

    def draw(low, high, count=None):
        values = random.uniform(low, high, count)
        return float(values) if count is None else values  # Python floats keep the pictures in float32

    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    pixel_x, pixel_y = np.meshgrid(axis, axis)  # (size, size), -1 .. 1, y downwards

    skin = np.array([0.98, 0.80, 0.69]) * (1 - draw(0, 0.65) * np.array([0.75, 0.95, 1.05]))
    hair = [(0.09, 0.07, 0.06), (0.30, 0.18, 0.10), (0.55, 0.33, 0.15), (0.87, 0.70, 0.40), (0.55, 0.55, 0.56),
            (0.62, 0.22, 0.10)][random.randint(6)] * draw(0.8, 1.15, 3)  # fmt: skip
    iris = [(0.25, 0.45, 0.65), (0.30, 0.20, 0.12), (0.30, 0.45, 0.28)][random.randint(3)]
    top, bottom = draw(0.1, 0.95, 3), draw(0.1, 0.95, 3)
    canvas = [(a + (b - a) * (pixel_y + 1) / 2).astype(np.float32) for a, b in zip(top, bottom, strict=True)]

    roll, yaw, scale = draw(-0.2, 0.2), draw(-1, 1), draw(0.88, 1.08)
    cosine, sine = float(np.cos(roll)), float(np.sin(roll))
    shift_x, shift_y = draw(-0.08, 0.08), draw(-0.02, 0.1)
    x = ((pixel_x - shift_x) * cosine + (pixel_y - shift_y) * sine) / scale
    y = (-(pixel_x - shift_x) * sine + (pixel_y - shift_y) * cosine) / scale
    light = 1 + draw(-0.3, 0.3) * x - draw(0, 0.2) * y  # (size, size)

    def ellipse(centre_x, centre_y, radius_x, radius_y, sharpness=1.0):
        distance = np.sqrt(((x - centre_x) / radius_x) ** 2 + ((y - centre_y) / radius_y) ** 2)
        return np.clip((1 - distance) * min(radius_x, radius_y) * size / 2 * sharpness + 0.5, 0, 1)

    def paint(mask, colour, shade=1.0):
        for channel in range(3):
            canvas[channel] += (shade * float(colour[channel]) - canvas[channel]) * mask

    width, height = draw(0.46, 0.56), draw(0.62, 0.72)  # half the face
    turn = yaw * 0.12  # how far the features sit beside the middle of the head
    length = draw(0.0, 0.9)  # of the hair
    for centre in (-0.42, 0.42) if length > 0.3 else ():
        paint(ellipse(centre, 0.25 * length + 0.1, 0.3, 0.45 + 0.5 * length), hair, light * 0.8)
    paint(ellipse(0, -0.15, width * 1.28, height * 1.22), hair, light * 0.85)
    paint(ellipse(0, 0.72, 0.22, 0.4), skin, light * 0.72)  # neck
    paint(ellipse(0, 1.28, draw(0.75, 1.0), 0.45), draw(0.05, 0.9, 3), light)  # clothes
    for side in (-1, 1):
        paint(ellipse(side * width * 0.98 - turn * 0.4, 0.05, 0.09, 0.15), skin, light * 0.85)  # ears
    paint(ellipse(0, 0, width, height), skin, light)
    for side in (-1, 1):
        paint(ellipse(turn + side * 0.27, 0.22, 0.15, 0.12, 0.15) * draw(0.1, 0.5), skin * [1.0, 0.72, 0.70], light)

    fringe, parting = draw(0.30, 0.62), draw(-0.35, 0.35)
    above = np.clip((-fringe + 0.25 * (x - parting) ** 2 * draw(0.2, 1.5) - y) * size / 2 + 0.5, 0, 1)
    paint(above * ellipse(0, -0.05, width * 1.08, height * 1.12), hair, light)

    open_eye, eye_y, gap = draw(0.045, 0.085), draw(-0.12, -0.03), draw(0.20, 0.26)
    gaze, brow_tilt, brow = draw(-0.03, 0.03), draw(-0.15, 0.15), draw(0.018, 0.04)
    for side in (-1, 1):
        eye_x = turn + side * gap
        paint(ellipse(eye_x, eye_y, 0.15, open_eye + 0.05, 0.4) * 0.35, skin * 0.5, light)  # socket
        eye = ellipse(eye_x, eye_y, 0.115, open_eye)
        paint(eye, (0.95, 0.94, 0.92), light)
        paint(eye * ellipse(eye_x + gaze, eye_y, 0.06, 0.06), iris)
        paint(eye * ellipse(eye_x + gaze, eye_y, 0.028, 0.028), (0.02, 0.02, 0.02))
        paint(ellipse(eye_x + gaze + 0.018, eye_y - 0.02, 0.014, 0.014), (1, 1, 1))
        arch = y + side * brow_tilt * (x - eye_x) + 0.9 * (x - eye_x) ** 2
        mask = np.clip((brow - np.abs(arch - eye_y + 0.17)) * size / 2 + 0.5, 0, 1)
        paint(mask * np.clip((0.14 - np.abs(x - eye_x)) * size / 4 + 0.5, 0, 1), np.asarray(hair) * 0.7)

    nose = draw(0.06, 0.10)
    paint(ellipse(turn * 1.2 + 0.03, 0.1, 0.05, 0.17, 0.3) * 0.35, skin * 0.7, light)
    paint(ellipse(turn * 1.3, 0.22, nose, 0.045, 0.6) * 0.55, skin * 0.68, light)

    smile, mouth, lips = draw(-0.8, 3.0), draw(0.13, 0.21), draw(0.03, 0.055)
    lip_colour = skin * [0.85, 0.52, 0.52] + draw(0, 0.12) * np.array([1, 0, 0.1])
    bend = y - 0.42 + smile * ((x - turn) ** 2 - mouth**2 / 2)  # 0 along the line between the lips
    across = np.clip(1 - ((x - turn) / mouth) ** 2, 0, None)
    paint(np.clip((lips * np.sqrt(across) - np.abs(bend)) * size / 2 + 0.5, 0, 1) * (across > 0), lip_colour, light)
    teeth = draw(-0.02, 0.03)
    if teeth > 0:
        paint(np.clip((teeth * across - np.abs(bend)) * size / 2 + 0.5, 0, 1) * (across > 0.2), (0.96, 0.95, 0.92))
    return (np.clip(np.stack(canvas, axis=2), 0, 1) * 255).round().astype(np.uint8)
