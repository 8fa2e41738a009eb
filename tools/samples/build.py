"""Build samples/photos and samples/README.md from Debian packages, scikit-image's wheel and Pillow drawings.

The packages are data, and only this script needs them:

    mkdir packages && cd packages
    apt-get download gcompris-qt-data lomiri-wallpapers-16.04 fonts-noto-color-emoji fonts-dejavu-core
    for package in *.deb; do dpkg -x "$package" .; done
    cd .. && python tools/samples/build.py --packages packages

Seeded: the same packages, Pillow and scikit-image give the same bytes.
"""

# ruff: noqa: E501 (one line per picture reads better)
from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFilter, ImageFont

ROOT = Path(__file__).resolve().parents[2]
LONG_SIDE = 560
QUALITY = 82
COMMONS = "https://commons.wikimedia.org/wiki/File:"
GCOMPRIS = "gcompris-qt-data"
LOMIRI = "lomiri-wallpapers-16.04"


class Photo(NamedTuple):
    """name: file name in samples/photos. source: where it is in its package. link: its page, when the source gives one."""

    name: str
    package: str
    source: str
    author: str
    licence: str
    link: str
    caption: str


def _erase(name: str, author: str, licence: str, page: str, caption: str) -> Photo:
    return Photo(f"{name}.jpg", GCOMPRIS, f"erase/resource/{name}.webp", author, licence, COMMONS + page, caption)


def _animal(name: str, author: str, licence: str, page: str, caption: str) -> Photo:
    source = f"explore_world_animals/resource/animals/{name}.webp"
    return Photo(f"{name}.jpg", GCOMPRIS, source, author, licence, COMMONS + page, caption)


def _farm(name: str, author: str, licence: str, page: str, caption: str) -> Photo:
    source = f"explore_farm_animals/resource/animals/{name}.webp"
    return Photo(f"farm_{name}.jpg", GCOMPRIS, source, author, licence, COMMONS + page, caption)


def _place(path: str, name: str, author: str, licence: str, page: str, caption: str) -> Photo:
    source = f"explore_monuments/resource/{path}.webp"
    return Photo(f"{name}.jpg", GCOMPRIS, source, author, licence, COMMONS + page, caption)


def _music(path: str, name: str, author: str, licence: str, page: str, caption: str) -> Photo:
    source = f"explore_world_music/resource/music/{path}.webp"
    return Photo(f"{name}.jpg", GCOMPRIS, source, author, licence, COMMONS + page, caption)


def _lomiri(path: str, name: str, author: str, licence: str, caption: str) -> Photo:
    return Photo(f"{name}.jpg", LOMIRI, f"usr/share/backgrounds/{path}.jpg", author, licence, "", caption)


def _scikit(path: str, author: str, licence: str, link: str, caption: str) -> Photo:
    return Photo(f"{Path(path).stem}.jpg", "scikit-image", path, author, licence, link, caption)


PD, CC0, BY2, BY4, BYSA4 = "public domain", "CC0-1.0", "CC-BY-2.0", "CC-BY-4.0", "CC-BY-SA-4.0"

# Authors, licences and pages are those of the README files inside gcompris-qt-data, of lomiri-wallpapers' debian/copyright
# and of scikit-image's documentation of skimage.data. Captions were written by looking at the pictures.
PHOTOS = (
    _erase("bee", "aussiegall", BY2, "Pollinationn.jpg", "A honey bee flies towards bright orange flower buds."),
    _erase("butterfly", "Jee & Rani Nature Photography", BYSA4, "Parantica_aglea_at_Nayikayam_Thattu.jpg",
           "A black and white butterfly sits on a purple flower."),
    _erase("camels", "Alexandr frolov", BYSA4, "Camelus_bactrianus_in_western_Mongolia_02.jpg",
           "Two Bactrian camels walk across a dry plain."),
    _erase("caterpillar", "Ivar Leidus", BYSA4, "Papilio_machaon_-_Daucus_carota_-_Keila.jpg",
           "A green and black striped caterpillar crawls along a thin plant stem."),
    _erase("cheetah", "Charles J. Sharp", BYSA4, "Cheetah_(Acinonyx_jubatus)_female_2.jpg",
           "A cheetah lies in the grass with its head raised."),
    _erase("crab", "Nosferattus", CC0, "Sally_Lightfoot_Crab_2019.jpg", "A red and orange crab walks over grey stone."),
    _erase("dolphin", "טל שמע", BYSA4, "Eilat_Dolphin_Reef_(3).jpg", "A dolphin swims under water in the deep blue sea."),
    _erase("gorilla", "Charles J. Sharp", BYSA4, "Mountain_gorilla_(Gorilla_beringei_beringei)_female_2.jpg",
           "A black mountain gorilla rests among green leaves."),
    _erase("gosling", "Stephan Sprinz", BYSA4,
           "Graugans-G%C3%B6ssel_(anser_anser)_im_Naturschutzgebiet_Wagbachniederung.jpg",
           "A fluffy yellow gosling stands in the grass."),
    _erase("heron", "Stephan Sprinz", BYSA4, "Purpurreiher_(ardea_purpurea)_im_Flug_-_NSG_Wagbachniederung_1.jpg",
           "A heron in flight with its wings spread."),
    _erase("horse", "Eatcha", BYSA4, "Zaniskari_Horse_in_Ladakh.jpg",
           "A brown horse stands on a plain in front of mountains."),
    _erase("kingfisher", "Frank-2.0", CC0, "Eisvogel_kingfisher.jpg",
           "A blue and orange kingfisher perches on a mossy branch."),
    _erase("kitten", "GalgenTX", BY2, "A_posing_kitten_(Flickr).jpg", "An orange tabby kitten looks over a piece of wood."),
    _erase("meerkats", "Charles J. Sharp", BYSA4, "Meerkat_(Suricata_suricatta)_Tswalu.jpg",
           "Three meerkats stand upright side by side."),
    _erase("penguin", "Gordon Leggett", BYSA4, "2019-03-03_Chinstrap_penguin_on_Barrientos_Island,_Antarctica.jpg",
           "A chinstrap penguin walks over green ground."),
    _erase("red_panda", "Mathias Appel", CC0, "Red_Panda_(30324056733).jpg", "A red panda on a branch between green leaves."),
    _erase("rhinoceros", "Charles J. Sharp", BYSA4, "Indian_rhinoceros_(Rhinoceros_unicornis)_4.jpg",
           "An Indian rhinoceros stands on sandy ground beside the water."),
    _erase("swans", "Charles J. Sharp", BYSA4, "Mute_swans_(Cygnus_olor)_and_cygnets.jpg",
           "Two white swans swim on dark water with a row of cygnets between them."),
    _erase("toucan", "LG Nyqvist", BYSA4, "Pteroglossus_torquatus_Costa_Rica.jpg",
           "A toucan with a yellow and red belly sits on a mossy branch."),
    _farm("cat", "Loliloli", PD, "Spielendes_K%C3%A4tzchen.JPG",
          "A black and white kitten plays with a ball of yarn on a pink blanket."),
    _farm("chicken", "Tranquilles", PD, "Chickens_at_Tranquilles_B%26B.JPG", "Four brown chickens stand on a lawn."),
    _farm("cow", "Dohduhdah", PD, "Cow-IMG_2050.JPG", "A black and white cow stands in a green meadow."),
    _farm("dog", "Hans Kemperman", PD, "German-shepherd-4040871920._(2).jpg", "A German shepherd dog stands on the grass."),
    _farm("duck", "Bernard Spragg", CC0, "Aylesbury_Duck._(9373723157).jpg", "A white duck with orange feet stands in dark water."),
    _farm("horse", "Seth Zeigler", CC0, "Nokota_Horse_Stud_Band.jpg", "A group of dark horses with foals under a blue sky."),
    _farm("owl", "Lepale", CC0, "Owl_The_Nightbird.jpg", "A brown owl sits on a branch."),
    _farm("pig", "Teinesavaii", PD, "Pig_1,_Savaii,_Samoa.JPG", "A young pig walks across a green lawn."),
    _farm("sheep", "Rob Mitchell", CC0, "Sheep_(33625876592).jpg", "A white sheep stands on green grass and looks at the camera."),
    _animal("bison", "Kurt Kaiser", CC0, "American_Bison_9.jpg", "A brown bison grazes in a green meadow."),
    _animal("crocodile", "Djambalawa", PD, "Saltwater_Crocodile_on_a_river_bank_(cropped).jpg",
            "A crocodile lies on the bank of a river."),
    _animal("giraffe", "Mike and Lara Wolfe", CC0, "Giraffe_courtship_(25657342808).jpg",
            "Two giraffes stand between dry bushes and trees."),
    _animal("hedgehog", "George Chernilevsky", PD, "Erinaceus_roumanicus_2020_G2.jpg", "A hedgehog walks through green grass."),
    _animal("kangaroo", "Vicki Nunn", PD, "Eastern_Grey_Kangaroo_%26_Joey2.jpg", "A grey kangaroo stands upright in the sun."),
    _animal("koala", "BurningWell", PD, "Koala_Perth_Zoo.jpg", "A koala sits in the fork of a tree."),
    _animal("lemur", "Mathias Appel", CC0, "Lemur_(37122852696).jpg", "Two ring-tailed lemurs sit on a log."),
    _animal("moose", "Ryan Hagerty", PD, "Male_Moose.jpg", "A moose with large antlers lies in a field."),
    _animal("panda", "Jeff Kubina", PD, "Giant_Panda_2004-03-2.jpg", "A giant panda sits next to a rock."),
    _animal("polar_bear", "anonymous", PD, "Churchill_Wildlife_Management_Area_polar_bear30.JPG",
            "A white polar bear walks over snowy ground."),
    _animal("scarlet_macaw", "Dcoetzee", CC0, "Scarlet_macaw_at_Cougar_Mountain_Zoological_Park.jpg",
            "A red parrot with blue and yellow wings sits on a branch."),
    _place("france/eiffelTower", "eiffel_tower", "Tognopop", PD, "Eiffel_Tower_20051010.jpg",
           "The Eiffel Tower in Paris under a clear blue sky."),
    _place("france/montStMichel", "mont_saint_michel", "Ali Sabbagh", CC0, "Mont_Saint-Michel_IMG_5109_(48875955288).jpg",
           "The abbey on the island of Mont Saint-Michel seen across wet meadows."),
    _place("france/pontduGard", "pont_du_gard", "Mimova", PD, "Pontdugard.jpg",
           "A Roman aqueduct with three rows of arches crosses a river."),
    _place("germany/brandenburgGate", "brandenburg_gate", "Evans1551", PD, "Brandenburg_Gate_(summer_2005).JPG",
           "The Brandenburg Gate in Berlin lit up in the evening."),
    _place("germany/neuschwansteinCastle", "neuschwanstein", "cameralends", CC0, "Neuschwanstein_Castle_(532850).jpg",
           "A white castle with towers stands on a wooded hill."),
    _place("india/goldenTemple", "golden_temple", "Jasdeep Singh", CC0, "Golden_Temple_.jpg",
           "A golden temple stands in the middle of a pool of water."),
    _place("india/hawaMahal", "hawa_mahal", "Janwiki", PD, "Hawa_Mahal,_Jaipur,_India.jpg",
           "A pink sandstone palace facade with many small windows."),
    _place("wonders/colosseum", "colosseum", "Urse Ovidiu", PD, "Colosseum_Roma_2009.jpg",
           "The Colosseum in Rome on a sunny day."),
    _place("wonders/greatWallofChina", "great_wall", "Nicolas Perrault III", CC0, "Great_Wall_of_China_July_2006.JPG",
           "The Great Wall of China winds over green hills."),
    _place("wonders/machuPicchu", "machu_picchu", "Guillaume Pascal", CC0, "Yet_another_pic_of_machu_picchu.jpg",
           "The ruins of Machu Picchu on a mountain ridge."),
    _place("wonders/chichenItza", "chichen_itza", "Daniel Schwen", BYSA4, "Chichen_Itza_3.jpg",
           "A Mayan step pyramid on a green lawn."),
    _place("usa/statueofLiberty", "statue_of_liberty", "Ypsilonatshared", PD, "Liberty_enlightening_the_world.JPG",
           "The Statue of Liberty on its stone pedestal."),
    _place("usa/mountRushmore", "mount_rushmore", "Eekim", CC0, "Mount_Rushmore,_Keystone,_South_Dakota.jpg",
           "Four faces carved into the rock of Mount Rushmore."),
    _place("usa/canyondeChelly", "canyon", "Nikater", PD, "Canyon_de_chelly09.jpg",
           "A river runs through a canyon of red rock with green trees."),
    _place("usa/castleClinton", "castle_clinton", "Jack E. Boucher, National Park Service", PD,
           "Castle_Clinton_National_Monument_in_Battery_Park_-_New_York_City_-_Areal_view_-_1961.jpg",
           "A black and white aerial photograph of a round fort at the waterfront of New York."),
    _place("egypt/redPyramid", "red_pyramid", "Chipdawes", PD, "RedPyramid.JPG", "A large pyramid in the desert."),
    _music("africa", "drums", "Kenneth Ritchards", PD, "Bata_drums.jpg", "Three hand drums lie on the grass."),
    _music("america", "drum_kit", "Tom Harpel", BY2, "Onalaska-Practice6.jpg", "A drum kit and an electric guitar in a room."),
    _music("orchestra", "orchestra", "ABC Informática", PD, "Orchestra_of_the_18th_Century.jpg",
           "An orchestra plays on the stage of a concert hall."),
    _music("mexico", "mariachi", "Elidealista", CC0, "Wikipedia_10_Guadalajara_-_Mariachi.jpg",
           "Musicians with guitars play together outdoors."),
    _lomiri("Picture_0B_by_freespace", "fig", 'Trevor "Freespace"', BY4, "Half a fig lies in an orange bowl."),
    _lomiri("Picture_1A_by_freespace", "paintbrushes", 'Trevor "Freespace"', BY4, "Paintbrushes covered in bright colours."),
    _lomiri("Wine_by_Jakkub_Mede", "wine", "Jakub Mede", BY4,
            "A bottle of red wine and a glass on a table behind a drum on a bean bag."),
    _lomiri("friends_by_Aitzol_Berasategi", "two_dogs", "Aitzol Berasategi", BY4,
            "Two brown dogs look out of a wooden house."),
    _lomiri("life_by_Aitzol_Berasategi", "stream", "Aitzol Berasategi", BY4, "A small stream runs over rocks in a forest."),
    _lomiri("picosdeeuropa_by_Aitzol_Berasategi", "mountains", "Aitzol Berasategi", BY4,
            "A path leads over a meadow towards rocky mountains with patches of snow."),
    _lomiri("seeding_by_Clements_Engelhardt", "dandelion", "Clemens Engelhardt", CC0,
            "Dandelion seed heads in a meadow in the evening sun."),
    _lomiri("sunset_by_Aitzol_Berasategi", "sunset", "Aitzol Berasategi", BY4, "The sun sets behind the hills."),
    _scikit("astronaut.png", "NASA", PD, "https://flic.kr/p/r9qvLn",
            "A smiling astronaut in an orange space suit in front of a flag and a model of the space shuttle."),
    _scikit("camera.png", "Lav Varshney", CC0, "https://github.com/scikit-image/scikit-image/issues/3927",
            "A man looks through a camera on a tripod, in black and white."),
    _scikit("chelsea.png", "Stefan van der Walt", CC0, "", "A close-up of the face of a tabby cat with green eyes."),
    _scikit("coffee.png", "Rachel Michetti, courtesy of Pikolo Espresso Bar", CC0, "",
            "A cup of espresso with a spoon on a red saucer."),
    _scikit("rocket.jpg", "SpaceX", PD, "https://www.flickr.com/photos/spacexphotos/16511594820/",
            "A rocket on its launch pad at night."),
    _scikit("hubble_deep_field.jpg", "NASA", PD,
            "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/", "Hundreds of distant galaxies in space."),
)  # fmt: skip


def qt_resources(blob: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of every uncompressed or zlib-compressed file in a Qt .rcc resource file."""
    version, tree, data, names = struct.unpack(">4I", blob[4:20])
    entry_size = 22 if version >= 2 else 14

    def walk(index: int, path: str) -> Iterator[tuple[str, bytes]]:
        entry = tree + index * entry_size
        name_offset, flags = struct.unpack_from(">IH", blob, entry)
        if index:
            (length,) = struct.unpack_from(">H", blob, names + name_offset)
            start = names + name_offset + 6
            path = f"{path}/{blob[start : start + 2 * length].decode('utf-16-be')}"
        if flags & 2:
            count, first = struct.unpack_from(">II", blob, entry + 6)
            for child in range(first, first + count):
                yield from walk(child, path)
        elif not flags & 4:
            (offset,) = struct.unpack_from(">I", blob, entry + 10)
            (length,) = struct.unpack_from(">I", blob, data + offset)
            content = blob[data + offset + 4 : data + offset + 4 + length]
            yield path, zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0, "")


def read_photo(photo: Photo, packages: Path, resources: dict[str, bytes]) -> Image.Image:
    """The original picture, RGB, at full size."""
    if photo.package == GCOMPRIS:
        content = next(data for path, data in resources.items() if path.endswith("/" + photo.source))
    elif photo.package == "scikit-image":
        import skimage

        content = (Path(skimage.__file__).parent / "data" / photo.source).read_bytes()
    else:
        content = (packages / photo.source).read_bytes()
    return Image.open(io.BytesIO(content)).convert("RGB")


def shrink(image: Image.Image, long_side: int = LONG_SIDE) -> Image.Image:
    image = image.copy()
    image.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
    return image


def jpeg(image: Image.Image, quality: int = QUALITY, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True, **options)
    return buffer.getvalue()


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **options)
    return buffer.getvalue()


def emoji(packages: Path, character: str) -> Image.Image:
    font = ImageFont.truetype(packages / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", 109)
    image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((12, 16), character, font=font, embedded_color=True)
    return image.resize((320, 320), Image.Resampling.LANCZOS)


def drawings(packages: Path) -> dict[str, tuple[bytes, str]]:
    """Pictures made here (CC0-1.0): name -> (bytes, caption)."""
    fonts = packages / "usr/share/fonts/truetype/dejavu"
    small, large = (ImageFont.truetype(fonts / "DejaVuSans.ttf", size) for size in (20, 34))

    chart = Image.new("RGB", (520, 360), "white")
    draw = ImageDraw.Draw(chart)
    draw.text((130, 12), "Visitors per month", font=small, fill="black")
    draw.line([(60, 50), (60, 310), (490, 310)], fill="black", width=2)
    for index, value in enumerate((80, 120, 95, 170, 210, 240)):
        left = 80 + index * 68
        draw.rectangle([left, 310 - value, left + 44, 309], fill=(52, 101, 164))
        draw.text((left + 6, 318), "JFMAMJ"[index], font=small, fill="black")

    letter = Image.new("RGB", (480, 600), (252, 251, 247))
    draw = ImageDraw.Draw(letter)
    draw.text((40, 40), "INVOICE 2041", font=large, fill="black")
    lines = ("12 apples         6.00", "3 notebooks      10.50", "1 lamp           39.90", "", "Total            56.40",
             "", "Thank you for your order.", "Payable within 30 days.")  # fmt: skip
    for index, line in enumerate(lines):
        draw.text((40, 120 + 40 * index), line, font=small, fill=(40, 40, 40))

    screen = Image.new("RGB", (560, 350), (30, 30, 34))
    draw = ImageDraw.Draw(screen)
    draw.rectangle([0, 0, 560, 34], fill=(60, 60, 66))
    for index, line in enumerate(("$ ls", "notes.txt  photos  report.pdf", "$ wc -l notes.txt", "42 notes.txt", "$ _")):
        draw.text((20, 56 + 36 * index), line, font=small, fill=(180, 230, 180))

    gradient = Image.linear_gradient("L").resize((480, 320))
    gradient = Image.merge("RGB", (gradient, gradient.rotate(180), Image.new("L", (480, 320), 160)))

    shapes = Image.new("RGB", (480, 360), (240, 236, 220))
    draw = ImageDraw.Draw(shapes)
    draw.ellipse([40, 60, 200, 220], fill=(200, 40, 40))
    draw.rectangle([240, 40, 420, 180], fill=(40, 90, 200))
    draw.polygon([(140, 330), (300, 210), (420, 330)], fill=(40, 150, 70))

    return {
        "chart.png": (png(chart), "A bar chart with six blue bars."),
        "invoice.png": (png(letter), "A printed invoice with a list of items and a total."),
        "terminal.png": (png(screen), "A screenshot of a terminal window with green text."),
        "gradient.png": (png(gradient), "A smooth colour gradient."),
        "shapes.png": (png(shapes), "A red circle, a blue rectangle and a green triangle on a beige background."),
    }


def watermarked(image: Image.Image, packages: Path, text: str) -> Image.Image:
    font = ImageFont.truetype(packages / "usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf", 46)
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for row in range(-1, 4):
        for column in range(-1, 3):
            draw.text((column * 300 + row % 2 * 120, row * 120), text, font=font, fill=(255, 255, 255, 130))
    layer = layer.rotate(20, resample=Image.Resampling.BICUBIC)
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def huge_png(side: int) -> bytes:
    """A PNG whose header announces side x side pixels, with one kilobyte of data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


HTML = b"""<!DOCTYPE html>
<html><head><title>404 Not Found</title></head>
<body><h1>Not Found</h1><p>The picture you asked for has moved.</p></body></html>
"""


def trouble(photos: dict[str, Image.Image], packages: Path) -> dict[str, tuple[bytes, str | None, str]]:
    """The planted trouble: name -> (bytes, caption or None, what clipfilter does with it)."""
    captions = {photo.name: photo.caption for photo in PHOTOS}
    astronaut, coffee, kitten = photos["astronaut.jpg"], photos["coffee.jpg"], photos["kitten.jpg"]
    crab, sheep, camels = photos["crab.jpg"], photos["farm_sheep.jpg"], photos["camels.jpg"]

    exif = Image.Exif()
    exif[0x0112] = 6  # shown after turning 90 degrees clockwise
    deep = shrink(photos["castle_clinton.jpg"], 360).convert("L")
    deep16 = Image.frombytes("I;16", deep.size, b"".join(struct.pack("<H", value * 257) for value in deep.tobytes()))
    frames = [shrink(photos["penguin.jpg"], 240).rotate(angle).quantize(64) for angle in (0, 4, 0, -4)]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:], duration=200, loop=0)
    dark = shrink(photos["machu_picchu.jpg"]).point(lambda value: value // 12)

    near = "near-duplicate of {}: both are kept without a deduplication rule, one of them with it"
    return {
        "astronaut_copy.jpg": (
            jpeg(astronaut, 45), captions["astronaut.jpg"], near.format("astronaut.jpg (recompressed at quality 45)")),
        "coffee_small.jpg": (
            jpeg(shrink(coffee, 300), 80), captions["coffee.jpg"], near.format("coffee.jpg (half its size)")),
        "kitten_crop.jpg": (
            jpeg(kitten.crop((12, 8, kitten.width - 12, kitten.height - 8)), 75), captions["kitten.jpg"],
            near.format("kitten.jpg (cropped by a few pixels)")),
        "truncated.jpg": (
            jpeg(photos["moose.jpg"])[:9000], captions["moose.jpg"], "failed: `decode_error` (the file is cut off)"),
        "not_found.jpg": (
            HTML, "A picture that was never downloaded.", "failed: `decode_error` (an HTML page, not an image)"),
        "tiny.png": (
            png(coffee.resize((16, 16))), "A very small picture.", "decoded; a `min_side` rule rejects it (16 x 16)"),
        "huge.png": (
            huge_png(60000), "A picture of an enormous size.",
            "failed: `image_too_large`, from the header (60000 x 60000 pixels in 1 kB)"),
        "cmyk.jpg": (
            jpeg(photos["scarlet_macaw.jpg"].convert("CMYK")), captions["scarlet_macaw.jpg"],
            "CMYK JPEG with Adobe's inversion: decoded to RGB; also a near-duplicate of scarlet_macaw.jpg"),
        "rotated.jpg": (
            jpeg(photos["statue_of_liberty.jpg"].transpose(Image.Transpose.ROTATE_90), exif=exif),
            captions["statue_of_liberty.jpg"],
            "EXIF orientation 6: turned upright; also a near-duplicate of statue_of_liberty.jpg"),
        "emoji_palette.png": (
            png(emoji(packages, "\N{BICYCLE}").quantize(64)), "A drawing of a bicycle.",
            "palette PNG with transparency: composed on white"),
        "gray16.png": (
            png(deep16), captions["castle_clinton.jpg"],
            "16-bit gray PNG: decoded to 8 bits; also a near-duplicate of castle_clinton.jpg"),
        "penguin_animated.gif": (
            animation.getvalue(), captions["penguin.jpg"], "animated GIF: the first frame counts"),
        "no_caption.jpg": (
            jpeg(photos["stream.jpg"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)), None,
            "no caption: `on_missing` of the policy where a rule needs one"),
        "watermark_crab.jpg": (
            jpeg(watermarked(crab, packages, "SAMPLE")), "A red crab behind a watermark.", "for a watermark rule"),
        "watermark_camels.jpg": (
            jpeg(watermarked(camels, packages, "PREVIEW")), "Two camels behind a watermark.", "for a watermark rule"),
        "blurred.jpg": (
            jpeg(sheep.filter(ImageFilter.GaussianBlur(9))), "A blurred photo of a sheep.", "for a rule on `cf_blur`"),
        "dark.jpg": (jpeg(dark), "A very dark photo of mountains.", "for a rule on `cf_brightness`"),
    }  # fmt: skip


SWAPPED = (("bee.jpg", "eiffel_tower.jpg"), ("rhinoceros.jpg", "orchestra.jpg"))

README = """# Sample data

`photos/` is an image folder with captions in `photos/captions.jsonl` (one JSON object per line, fields `file_name` and
`caption`). It is what `make demo` filters, and small on purpose. It was built by `tools/samples/build.py`, is free to redistribute,
and every picture below is credited with author and licence. Photographs were resized (longer side {long_side} pixels at most) and saved as
JPEG; CC-BY-SA pictures stay under their licence, the captions and the pictures drawn here are CC0-1.0.

## Planted trouble

| file | what it is for, and what clipfilter does with it |
| --- | --- |
{trouble}

## Credits

| file | author | licence | source |
| --- | --- | --- | --- |
{credits}

The licence texts: [CC0-1.0](https://creativecommons.org/publicdomain/zero/1.0/),
[CC-BY-2.0](https://creativecommons.org/licenses/by/2.0/), [CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/),
[CC-BY-SA-4.0](https://creativecommons.org/licenses/by-sa/4.0/), [OFL-1.1](https://openfontlicense.org/).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the extracted Debian packages")
    parser.add_argument("--out", type=Path, default=ROOT / "samples", help="where photos/ and README.md go")
    arguments = parser.parse_args()
    packages: Path = arguments.packages

    wanted = ("erase", "explore_world_animals", "explore_farm_animals", "explore_monuments", "explore_world_music")
    resources: dict[str, bytes] = {}
    for name in wanted:
        resources |= qt_resources((packages / f"usr/share/gcompris-qt/rcc/{name}.rcc").read_bytes())

    rows: list[tuple[str, bytes, str | None]] = []
    credits_: list[tuple[str, str, str, str]] = []
    loaded: dict[str, Image.Image] = {}
    for photo in PHOTOS:
        loaded[photo.name] = shrink(read_photo(photo, packages, resources))
        rows.append((photo.name, jpeg(loaded[photo.name]), photo.caption))
        source = f"{photo.package}: {photo.source}" + (f", <{photo.link}>" if photo.link else "")
        credits_.append((photo.name, photo.author, photo.licence, source))
    for name, (content, caption) in drawings(packages).items():
        rows.append((name, content, caption))
        credits_.append((name, "clipfilter", CC0, "drawn by tools/samples/build.py"))
    for name, character, caption in (
        ("emoji_pizza.png", "\N{SLICE OF PIZZA}", "A drawing of a slice of pizza."),
        ("emoji_cat.png", "\N{CAT FACE}", "A cartoon of the face of a yellow cat."),
    ):
        rows.append((name, png(emoji(packages, character)), caption))
        credits_.append((name, "Google (Noto Color Emoji)", "OFL-1.1", "fonts-noto-color-emoji"))
    planted = trouble(loaded, packages)
    for name, (content, wanted_caption, _) in planted.items():
        rows.append((name, content, wanted_caption))
    credits_.append(("emoji_palette.png", "Google (Noto Color Emoji)", "OFL-1.1", "fonts-noto-color-emoji"))
    credits_.append(("the others under planted trouble", "as the pictures they were made from", "the same", "above"))

    captions: dict[str, str | None] = {name: caption for name, _, caption in rows}
    for one, other in SWAPPED:
        captions[one], captions[other] = captions[other], captions[one]
    explained = [
        (f"{one}, {other}", "swapped captions: low similarity, an alignment rule rejects both")
        for one, other in SWAPPED
    ] + [(name, text) for name, (_, _, text) in planted.items()]

    out: Path = arguments.out / "photos"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    random.Random(0).shuffle(rows)  # so that trouble does not come in one block
    with (out / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for name, content, _ in rows:
            (out / name).write_bytes(content)
            if captions[name] is not None:
                lines.write(json.dumps({"file_name": name, "caption": captions[name]}, ensure_ascii=False) + "\n")
    text = README.format(
        long_side=LONG_SIDE,
        trouble="\n".join(f"| {name} | {words} |" for name, words in explained),
        credits="\n".join("| " + " | ".join(row) + " |" for row in credits_),
    )
    (arguments.out / "README.md").write_text(text, encoding="utf-8")
    print(f"{len(rows)} files, {sum(len(content) for _, content, _ in rows) / 1e6:.1f} MB in {out}")


if __name__ == "__main__":
    main()
