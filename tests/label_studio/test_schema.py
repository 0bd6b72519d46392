"""Labeling configs: what is read, and what each refusal says."""

from __future__ import annotations

import time

import pytest
from defusedxml.ElementTree import fromstring

import ppal_backend.label_studio.schema as schema_module
from ppal_backend.errors import LabelConfigError
from ppal_backend.label_studio.schema import ImageAddress, LabelSchema, parse_label_config

LABEL = '<Label value="A"/>'
IMAGE = '<Image name="i" value="$i"/>'
FULL = """
<View>
  <Header value="x"/>
  <Image name="img" value="$picture"/>
  <Choices name="weather" toName="img"><Choice value="sun"/></Choices>
  <RectangleLabels name="boxes" toName="img" model_score_threshold="0.25">
    <Label value="Car" alias="c1" predicted_values="car, truck"/>
    <Label value="Bus"/>
    <Label value="Bike" predicted_values="bicycle" model_score_threshold="0.6"/>
  </RectangleLabels>
  <RectangleLabels name="second" toName="img"><Label value="Tree"/></RectangleLabels>
</View>
"""


def test_everything_of_a_full_config():
    schema = parse_label_config(FULL)
    assert (schema.from_name, schema.to_name, schema.image) == ("boxes", "img", ImageAddress("$picture"))
    assert schema.labels == ("c1", "Bus", "Bike")
    assert dict(schema.aliases) == {"Car": "c1"}
    assert dict(schema.predicted_values) == {"car": "c1", "truck": "c1", "bicycle": "Bike"}
    assert schema.score_threshold == 0.25
    assert (schema.threshold("Bike", 0.9), schema.threshold("Bus", 0.9)) == (0.6, 0.25)


def test_named_control_and_default_threshold():
    schema = parse_label_config(FULL, from_name="second")
    assert schema.labels == ("Tree",)
    assert schema.threshold("Tree", 0.4) == 0.4


def test_label_lookups():
    schema = parse_label_config(FULL)
    assert [schema.label(name) for name in ("c1", "Car", "Bus", "Plane")] == ["c1", "c1", "Bus", None]
    classes = [schema.label_of_class(name) for name in ("truck", "Bus", "Car", "c1", "x")]
    assert classes == ["c1", "Bus", "c1", "c1", None]


def test_what_predicted_values_lists_by_label_and_that_a_versions_own_label_comes_first():
    """A trained version's box of the label `bird` was published as another label whose attribute names `bird`."""
    labels = '<Label value="puffin" predicted_values="bird, Bird,, bird"/><Label value="bird"/>'
    labels += '<Label value="mouse" predicted_values=""/>'
    schema = parse_label_config(f'<View>{IMAGE}<RectangleLabels name="r" toName="i">{labels}</RectangleLabels></View>')
    assert dict(schema.class_names) == {"puffin": ("bird", "Bird"), "mouse": ()}
    assert [schema.label_of_class(name) for name in ("bird", "Bird", "puffin")] == ["bird", "puffin", "puffin"]


def test_a_config_that_was_read_lately_is_not_parsed_again(monkeypatch):
    """An approval parsed the project's config twice."""
    parsed = []
    monkeypatch.setattr(schema_module, "fromstring", lambda xml, **how: parsed.append(xml) or fromstring(xml, **how))
    config = FULL.replace("truck", "lorry")
    assert parse_label_config(config) is parse_label_config(config) and len(parsed) == 1
    assert parse_label_config(config, "second").labels == ("Tree",), "another control is another schema"


def test_a_value_that_is_another_labels_alias_stays_that_label():
    schema = parse_label_config(
        '<View><Image name="i" value="$i"/><RectangleLabels name="r" toName="i">'
        '<Label value="A" alias="B"/><Label value="B" alias="C"/></RectangleLabels></View>'
    )
    assert [schema.label(name) for name in ("A", "B", "C")] == ["B", "B", "C"]


def test_control_on_text_is_passed_over_for_the_one_on_the_image():
    schema = parse_label_config(
        '<View><Text name="t" value="$t"/><Image name="i" value="$u"/>'
        '<RectangleLabels name="bad" toName="t"><Label value="A"/></RectangleLabels>'
        '<View><RectangleLabels name="good" toName="t,i"><Label value="B"/></RectangleLabels></View></View>'
    )
    assert (schema.from_name, schema.to_name) == ("good", "i")


def test_tag_and_attribute_case_do_not_matter():
    schema = parse_label_config(
        '<view><image name="i" value="$u"/>'
        '<rectanglelabels name="r" toname="i"><label value="A"/></rectanglelabels></view>'
    )
    assert schema == LabelSchema("r", "i", ImageAddress("$u"), ("A",))


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        ("", "got an empty one"),
        ("<View>", "text that is none"),
        ('<View><Image name="i" value="$i"/></View>', "no labeling control"),
        (
            "<View>" + IMAGE + '<PolygonLabels name="p" toName="i"/></View>',
            "only <PolygonLabels>",
        ),
        (
            '<View><Text name="t" value="$t"/><RectangleLabels name="r" toName="t"/></View>',
            "without an <Image>",
        ),
        (
            "<View>" + IMAGE + '<RectangleLabels name="r" toName="x"/></View>',
            "names none of",
        ),
        (
            '<View><Image name="i" value="$i"/><RectangleLabels name="r" toName="i" value="$labels"/></View>',
            "at least one <Label>",
        ),
        (
            '<View><Image name="i" valueList="$is"/><RectangleLabels name="r" toName="i">'
            + LABEL
            + "</RectangleLabels></View>",
            r'value="\$image"',
        ),
        (FULL.replace("$picture", "https://host/x.jpg"), r"expected <Image name=\"img\" value=\"\$…\">.*'https://host"),
        (FULL.replace("$picture", "https://host/${file}"), r"got value='https://host/\${file}'; write"),
        (FULL.replace("$picture", "$写真"), "letters a to z, digits and _"),
        (FULL.replace('"0.25"', '"1.5"'), "between 0 and 1"),
        (FULL.replace('"0.25"', '"high"'), "between 0 and 1"),
    ],
)
def test_refusals_say_what_is_missing(xml, text):
    with pytest.raises(LabelConfigError, match=text):
        parse_label_config(xml)


def test_unknown_control_lists_those_there_are():
    with pytest.raises(LabelConfigError, match="'boxes', 'second'"):
        parse_label_config(FULL, from_name="nope")


@pytest.mark.parametrize(
    "bomb",
    [
        '<!DOCTYPE v [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><View>&b;</View>',
        '<!DOCTYPE v SYSTEM "http://evil.test/x.dtd"><View/>',
        '<!DOCTYPE v [<!ENTITY x SYSTEM "file:///etc/passwd">]><View><Header value="&x;"/></View>',
    ],
)
def test_document_types_and_entities_are_refused(bomb):
    with pytest.raises(LabelConfigError, match="DOCTYPE"):
        parse_label_config(bomb)


def test_huge_and_deep_configs_end_in_an_error():
    with pytest.raises(LabelConfigError, match="below"):
        parse_label_config("<View>" + " " * 3_000_000 + "</View>")
    with pytest.raises(LabelConfigError):
        parse_label_config("<View>" * 100_000 + "</View>" * 100_000)


def test_image_address_of_a_task():
    image = parse_label_config(FULL).image
    assert image.url({"picture": "/data/x.jpg"}) == "/data/x.jpg"
    assert image.url({"picture": " "}) is None
    assert image.url({"picture": 5}) is None
    assert image.url({}) is None


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ("$files.photo", {"files": {"photo": "/a.jpg"}}),
        ("$photos[1]", {"photos": ["/b.jpg", "/a.jpg"]}),
        ("$pages[0].scan", {"pages": [{"scan": "/a.jpg"}]}),
        ("$files.photo", {"files.photo": "/a.jpg", "files": {"photo": "/b.jpg"}}),
    ],
)
def test_a_path_into_the_task_data_is_resolved(value, data):
    """Such configs were accepted, and no task had an image."""
    schema = parse_label_config(
        f'<View><Image name="i" value="{value}"/><RectangleLabels name="l" toName="i"><Label value="a"/>'
        "</RectangleLabels></View>"
    )
    assert schema.image.url(data) == "/a.jpg"
    assert [schema.image.url(d) for d in ({}, {"files": "x"}, {"photos": ["/b.jpg"]}, {"pages": {"scan": 1}})] == [
        None
    ] * 4


HOST = "https://host.test"


@pytest.mark.parametrize(
    ("value", "data", "url", "keys"),
    [
        ("https://host.test/dir/$file", {"file": "a b.jpg"}, f"{HOST}/dir/a b.jpg", "'file'"),
        ("$base/$file", {"base": HOST, "file": "a.jpg"}, f"{HOST}/a.jpg", "'base' and 'file'"),
        ("$base/$camera/$file", {"base": HOST, "camera": 5, "file": "a"}, f"{HOST}/5/a", "'base', 'camera' and 'file'"),
        ("$image?size=1", {"image": f"{HOST}/a.jpg"}, f"{HOST}/a.jpg?size=1", "'image'"),
        ("https://host.test/$f.name", {"f": {"name": "a.jpg"}}, f"{HOST}/a.jpg", "'f.name'"),
        ("https://host.test/$files[0]", {"files": ["a.jpg"]}, f"{HOST}/a.jpg", "'files[0]'"),
        (" $file/$file ", {"file": "a"}, "a/a", "'file'"),
        ("/data/local-files/?d=$file", {"file": "$file"}, "/data/local-files/?d=$file", "'file'"),
    ],
)
def test_a_value_with_text_around_its_keys_is_the_address_that_the_editor_shows(value, data, url, keys):
    """What Label Studio 1.23.2's labeling page showed; the first was refused, the second was of no task's image."""
    schema = parse_label_config(FULL.replace("$picture", value))
    assert (schema.image.url(data), schema.image.keys) == (url, keys)


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ("https://host.test/$file", {"other": "a.jpg"}),
        ("https://host.test/$file", {"file": None}),
        ("https://host.test/$file", {"file": ["a.jpg"]}),
        ("https://host.test/$file", {"file": True}),
        ("$base/$file", {"base": HOST}),
        ("https://host.test/$name.jpg", {"name": "a"}),
        ("$my-image", {"my-image": f"{HOST}/a.jpg"}),
    ],
)
def test_a_task_that_lacks_a_key_has_no_image_and_never_an_address_of_half_a_template(value, data):
    """Label Studio's page shows none either: it asks for https://host.test/undefined. A dot belongs to the name."""
    assert parse_label_config(FULL.replace("$picture", value)).image.url(data) is None


def test_a_label_that_is_written_twice_is_one_class():
    """Label Studio takes such a config; its editor, too, knows a label by the first that has the name."""
    labels = '<Label value="b"/><Label value="a" predicted_values="x" model_score_threshold="0.5"/><Label value="b"/>'
    labels += '<Label value="a" predicted_values="y" prompt="an a" model_score_threshold="0.9"/>'
    labels += '<Label value="Sea" alias="c"/><Label value="See" alias="c"/><Label value="Sea" alias="d"/>'
    schema = parse_label_config(FULL.replace('<Label value="Bus"/>', labels))
    assert schema.labels == ("c1", "b", "a", "c", "d", "Bike")
    assert (schema.class_names["a"], schema.label_of_class("y"), dict(schema.prompts)) == (("x",), None, {})
    assert schema.threshold("a", 0.1) == 0.5
    assert [schema.label(name) for name in ("Sea", "See", "c", "d")] == ["c", "c", "c", "d"]
    assert schema.shown["c"] == "Sea"


@pytest.mark.parametrize(
    ("image", "control", "told"),
    [
        ('value="$pages[{{idx}}].scan"', "", r"expected <Image name=\"i\" value=\"\$…\">"),
        (
            'valueList="$pages" value="$page"',
            "",
            "got an <Image> with valueList; import every image as a task of its own",
        ),
        ('value="$image"', 'value="$labels"', "takes them from each task; write them out"),
    ],
)
def test_what_is_never_resolved_is_refused_with_what_would_work(image, control, told):
    config = (
        f'<View><Image name="i" {image}/><RectangleLabels name="l" toName="i" {control}><Label value="a"/>'
        "</RectangleLabels></View>"
    )
    with pytest.raises(LabelConfigError, match=told):
        parse_label_config(config)


def test_a_repeater_is_refused_by_name_and_one_beside_the_boxes_is_not():
    boxes = '<Image name="i" value="$image"/><RectangleLabels name="l" toName="i"><Label value="a"/></RectangleLabels>'
    with pytest.raises(LabelConfigError, match="inside a <Repeater>; import every image as a task of its own"):
        parse_label_config(f'<View><Repeater on="$pages">{boxes}</Repeater></View>')
    assert parse_label_config(f'<View><Repeater on="$x"><Text name="t" value="$t"/></Repeater>{boxes}</View>').labels


BOXES = '<RectangleLabels name="l" toName="{}"><Label value="a"/></RectangleLabels>'


def test_one_control_on_several_images_is_refused():
    """Boxes drawn on the second image were taken for boxes of the first."""
    images = '<Image name="i" value="$a"/><Image name="j" value="$b"/>'
    with pytest.raises(LabelConfigError, match=r'toName="i,j"> on several images; import every image as a task'):
        parse_label_config(f"<View>{images}{BOXES.format('i,j')}</View>")
    assert parse_label_config(f"<View>{images}{BOXES.format('j')}</View>").image.keys == "'b'"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (f'<View><Video name="v" value="$v"/>{BOXES.format("v")}</View>', r"got <Video>, .*import frames as images"),
        ('<View><Video name="v" value="$v"/><VideoRectangle name="b" toName="v"/></View>', r"got <Video>, .*import"),
        ("export default () => <App/>;", "in XML tags, got an interface written as code"),
        ('<View><ReactCode name="x" toName="x"/></View>', "only <ReactCode>"),
    ],
)
def test_projects_of_other_kinds_are_refused_plainly(config, text):
    with pytest.raises(LabelConfigError, match=text):
        parse_label_config(config)


def test_prompts_by_label_for_labels_that_have_one():
    head = '<View><Image name="i" value="$u"/><RectangleLabels name="l" toName="i">'
    labels = '<Label value="crab" prompt=" small red crab "/><Label value="Car" alias="c1" prompt="car"/>'
    labels += '<Label value="x" prompt=""/>'
    schema = parse_label_config(f"{head}{labels}</RectangleLabels></View>")
    assert dict(schema.prompts) == {"crab": "small red crab", "c1": "car"}


def test_a_look_up_takes_no_longer_with_thousands_of_labels():
    """With the 1,203 classes of LVIS, writing the pre-annotations of an image took 45 ms of look-ups."""

    def seconds(number):
        schema = LabelSchema("label", "image", ImageAddress("$image"), tuple(f"label {i}" for i in range(number)))
        started = time.perf_counter()
        assert all(schema.label(f"label {i}") for i in [number - 1] * 2000)
        return time.perf_counter() - started

    few = min(seconds(10) for _ in range(5))
    assert min(seconds(10_000) for _ in range(5)) < 20 * few
