"""What the demo documents can say: facts, their wordings, and the questions asked about them.

``{}`` stands for the value, ``[a|b]`` for a free choice of words. Statements and questions of a fact share few words on
purpose, and questions borrow words from other facts, so that a keyword search does not find the sentence.
"""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """One thing a document can state.

    Attributes:
        name: what the fact is, unique within its document kind.
        statements: sentence patterns without the final full stop; ``{}`` is the value.
        questions: question patterns; ``{place}`` is "state" or "country" for a region.
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


CONTRACT: dict[str, tuple[Fact, ...]] = {
    "money": (
        Fact(
            "hourly pay",
            (
                "The basic wage [is|amounts to] {}",
                "Ordinary work [is rewarded with|earns] {} for sixty minutes",
                "The normal salary [comes to|has been set at] {} an hour",
                "The base rate [is fixed at|equals] {}",
            ),
            (
                "What is the pay per hour?",
                "How much does the employee [get|receive] per hour of regular time?",
                "How high is the hourly pay?",
                "What does the employer pay for each hour?",
            ),
        ),
        Fact(
            "overtime rate",
            (
                "Overtime is paid at {} per hour",
                "Extra hours [are compensated with|bring] {} each",
                "Pay for work beyond the [weekly|agreed] limit is {} per hour",
            ),
            (
                "What is earned by staying late?",
                "How much does one get when working longer than planned?",
                "What is the sum for additional time at the desk?",
            ),
        ),
        Fact(
            "travel allowance",
            (
                "The [travel|transport] allowance is {} per day",
                "Commuting is subsidised with {}",
                "For the way to work the employer pays {}",
            ),
            (
                "What does the employee get towards bus and train tickets?",
                "How much is reimbursed for the daily journey?",
                "What sum covers the trip from home?",
            ),
        ),
        Fact(
            "meal allowance",
            (
                "The [meal|food] allowance is {} per shift",
                "Lunch is supported with {}",
                "For the canteen the employer adds {} per day",
            ),
            (
                "How much is granted for eating?",
                "What does the company pay towards a hot dish?",
                "What is the daily sum for dinner and snacks?",
            ),
        ),
        Fact(
            "night supplement",
            (
                "Night shifts bring a supplement of {} per hour",
                "Work between ten in the evening and six in the morning earns {} more",
                "Late duty in the dark is rewarded with {} extra",
            ),
            (
                "What is the additional pay after midnight?",
                "How much more is paid per hour while others sleep?",
                "What is the premium for nocturnal hours?",
            ),
        ),
        Fact(
            "phone allowance",
            (
                "The phone allowance is {} per month",
                "Mobile calls are refunded with {}",
                "Use of a private handset is compensated with {} a month",
            ),
            (
                "What does the employer pay for the telephone?",
                "How much is the monthly sum for ringing customers?",
                "What is reimbursed for a smartphone contract?",
            ),
        ),
    ),
    "date": (
        Fact(
            "start",
            (
                "The [job|employment] starts on {}",
                "The first working day is {}",
                "The employee takes up the post on {}",
            ),
            (
                "When does work begin?",
                "What is the date of entry into the company?",
                "On which day does the contract commence?",
            ),
        ),
        Fact(
            "signature",
            (
                "Both parties signed on {}",
                "This agreement was concluded on {}",
                "The signatures were given on {}",
            ),
            (
                "When was the contract put on paper?",
                "What is the date under the document?",
                "On which day was the deal made?",
            ),
        ),
        Fact(
            "end",
            (
                "The employment ends on {}",
                "The post is limited and [expires|runs out] on {}",
                "The last working day is {}",
            ),
            (
                "When is the job over?",
                "Until which date is the employee hired?",
                "On which day does the contract terminate?",
            ),
        ),
        Fact(
            "pay review",
            (
                "Wages are looked at again on {}",
                "A raise can be discussed on {}",
                "The salary is revised on {}",
            ),
            (
                "When is the pay review?",
                "What is the date of the next talk about money?",
                "On which day may earnings go up?",
            ),
        ),
        Fact(
            "medical check",
            (
                "A doctor examines the employee on {}",
                "The health examination [is on|takes place on] {}",
                "The medical appointment is on {}",
            ),
            (
                "When is fitness for work tested?",
                "What is the date of the visit to the physician?",
                "On which day is the body checked?",
            ),
        ),
    ),
    "duration": (
        Fact(
            "notice",
            (
                "Either side may [leave|resign] after {}",
                "Notice of termination must be given {} ahead",
                "Whoever wants to quit announces it {} before",
            ),
            (
                "How long is the notice period?",
                "How much time passes before the contract can be cancelled?",
                "What warning is due for a dismissal?",
            ),
        ),
        Fact(
            "probation",
            (
                "The trial period is {}",
                "Probation lasts {}",
                "The employee is on test for {}",
            ),
            (
                "How long is one only hired provisionally?",
                "What is the length of the initial phase of evaluation?",
                "How much time does the company take to see whether work is good?",
            ),
        ),
        Fact(
            "holiday",
            (
                "Paid [holiday|leave] amounts to {} a year",
                "The yearly vacation is {}",
                "Every year the employee may rest for {}",
            ),
            (
                "How much time off is there?",
                "How long can one travel in summer?",
                "What is the length of recreation in each period of twelve months?",
            ),
        ),
        Fact(
            "sick pay",
            (
                "In case of illness wages continue for {}",
                "Sick employees are paid for {}",
                "Someone with a disease keeps the salary for {}",
            ),
            (
                "How long is the worker covered when unwell?",
                "For what time does money come while lying in bed with fever?",
                "How long does the company support the ailing?",
            ),
        ),
        Fact(
            "training",
            (
                "The introductory course takes {}",
                "New staff are taught for {}",
                "Instruction by colleagues goes on for {}",
            ),
            (
                "How long is the training?",
                "How much time is spent learning the job?",
                "What is the length of schooling at the beginning?",
            ),
        ),
    ),
    "person": (
        Fact(
            "employee",
            (
                "The employee is {}",
                "The post is given to {}",
                "Hired under this agreement is {}",
            ),
            (
                "Who will do the work?",
                "What is the name of the newcomer?",
                "Whom does the company recruit?",
            ),
        ),
        Fact(
            "supervisor",
            (
                "The [supervisor|superior] is {}",
                "Daily instructions are given by {}",
                "The team is led by {}",
            ),
            (
                "Who is the boss of the employee?",
                "What is the name of the manager?",
                "Whose orders must be followed?",
            ),
        ),
        Fact(
            "employer",
            (
                "The firm is represented by {}",
                "For the employer the paper was signed by {}",
                "The managing director is {}",
            ),
            (
                "Who acts for the company?",
                "What is the name at the top of the enterprise?",
                "Who concluded the deal on behalf of the business?",
            ),
        ),
        Fact(
            "contact",
            (
                "Questions about wages are answered by {}",
                "The payroll office is run by {}",
                "The clerk for personnel matters is {}",
            ),
            (
                "Who helps if the salary is wrong?",
                "What is the name of the contact in human resources?",
                "Whom does one call about money?",
            ),
        ),
        Fact(
            "deputy",
            (
                "During absence the duties pass to {}",
                "The substitute is {}",
                "In holidays the desk is taken over by {}",
            ),
            (
                "Who steps in when the employee is away?",
                "What is the name of the stand-in?",
                "Who replaces the worker in vacation?",
            ),
        ),
    ),
    "region": (
        Fact(
            "workplace",
            (
                "The office lies in {}",
                "Duties are carried out in {}",
                "The desk of the employee stands in {}",
            ),
            (
                "In which {place} is the place of work?",
                "What {place} does the job take place in?",
                "In which {place} will the worker be active?",
            ),
        ),
        Fact(
            "court",
            (
                "Disputes are heard by a judge in {}",
                "The competent court sits in {}",
                "Quarrels are settled in {}",
            ),
            (
                "In which {place} would a lawsuit be filed?",
                "What {place} has jurisdiction?",
                "In which {place} do the parties take legal action?",
            ),
        ),
        Fact(
            "home",
            (
                "The employee lives in {}",
                "The private address of the employee is in {}",
                "The family of the employee resides in {}",
            ),
            (
                "In which {place} is the home of the worker?",
                "What {place} does the hired person dwell in?",
                "In which {place} does the newcomer have a flat?",
            ),
        ),
        Fact(
            "headquarters",
            (
                "The company is registered in {}",
                "The seat of the employer is {}",
                "The firm is based in {}",
            ),
            (
                "In which {place} are the headquarters?",
                "What {place} does the business have its main office in?",
                "In which {place} does the management reside?",
            ),
        ),
        Fact(
            "course",
            (
                "The introductory course is held in {}",
                "New staff are taught in {}",
                "Training takes place in {}",
            ),
            (
                "In which {place} does one learn the job?",
                "What {place} is the school for beginners in?",
                "In which {place} are the lessons?",
            ),
        ),
    ),
}

CV: dict[str, tuple[Fact, ...]] = {
    "company": (
        Fact(
            "current employer",
            (
                "At present the applicant works for {}",
                "The current employer is {}",
                "Today the applicant is on the staff of {}",
            ),
            (
                "Where is the candidate employed now?",
                "Which company would the candidate have to leave?",
                "Which firm pays the candidate these days?",
            ),
        ),
        Fact(
            "first employer",
            (
                "The career began at {}",
                "The first [job|post] was at {}",
                "After school the applicant was hired by {}",
            ),
            (
                "Where did working life start?",
                "Which company was the initial employer?",
                "Which firm gave the candidate an opening as a beginner?",
            ),
        ),
        Fact(
            "internship",
            (
                "An internship was done at {}",
                "As a trainee the applicant spent a summer with {}",
                "A student placement was completed at {}",
            ),
            (
                "Where did the candidate gain practice while at university?",
                "Which company took the candidate as an intern?",
                "Which firm showed the student daily work for a short time?",
            ),
        ),
        Fact(
            "founder",
            (
                "Together with friends the applicant founded {}",
                "The applicant set up {}",
                "A start-up created by the applicant is called {}",
            ),
            (
                "Which company did the candidate establish?",
                "Which firm is an own business of the candidate?",
                "What is the enterprise launched by the candidate?",
            ),
        ),
        Fact(
            "adviser",
            (
                "As a consultant the applicant advised {}",
                "Freelance advice was given to {}",
                "A consulting contract linked the applicant with {}",
            ),
            (
                "Which company was a client?",
                "Which firm was counselled from outside?",
                "Who bought expertise from the candidate without a post?",
            ),
        ),
    ),
    "year": (
        Fact(
            "birth",
            (
                "The applicant was born in {}",
                "The year of birth is {}",
                "The applicant came into the world in {}",
            ),
            (
                "From what year does the age of the candidate follow?",
                "When did the life of the candidate begin?",
                "What year gives the age of the candidate?",
            ),
        ),
        Fact(
            "degree",
            (
                "The university degree was obtained in {}",
                "Studies were finished in {}",
                "The applicant graduated in {}",
            ),
            (
                "When did the candidate leave college?",
                "What year stands on the diploma?",
                "When were the final academic exams passed?",
            ),
        ),
        Fact(
            "abroad",
            (
                "The applicant moved abroad in {}",
                "A stay in a foreign country began in {}",
                "The applicant emigrated in {}",
            ),
            (
                "When did the candidate leave the homeland?",
                "What year brought a life overseas?",
                "When did the candidate cross the border for good?",
            ),
        ),
        Fact(
            "licence",
            (
                "The driving licence dates from {}",
                "The applicant learned to drive a car in {}",
                "The road test was passed in {}",
            ),
            (
                "Since when may the candidate steer a vehicle?",
                "When did the candidate get permission for traffic?",
                "What year stands on the permit for motoring?",
            ),
        ),
        Fact(
            "prize",
            (
                "A prize was won in {}",
                "The applicant received an award in {}",
                "A medal was given to the applicant in {}",
            ),
            (
                "When was the candidate honoured?",
                "What year brought a distinction?",
                "When did a jury choose the candidate?",
            ),
        ),
    ),
    "region": (
        Fact(
            "birthplace",
            (
                "The applicant was born in {}",
                "The place of birth is {}",
                "The applicant came into the world in {}",
            ),
            (
                "In which {place} is the candidate a native?",
                "What {place} is named on the birth certificate?",
                "In which {place} did the mother deliver the baby?",
            ),
        ),
        Fact(
            "residence",
            (
                "At present the applicant lives in {}",
                "The current flat is in {}",
                "Letters reach the applicant in {}",
            ),
            (
                "In which {place} is the candidate at home now?",
                "What {place} is the postal address in?",
                "In which {place} does the candidate reside today?",
            ),
        ),
        Fact(
            "university",
            (
                "The university attended lies in {}",
                "The applicant studied in {}",
                "Lectures were heard in {}",
            ),
            (
                "In which {place} did the candidate get a degree?",
                "What {place} was the college in?",
                "In which {place} did the candidate obtain academic education?",
            ),
        ),
        Fact(
            "school",
            (
                "The applicant went to school in {}",
                "The classroom of the early years was in {}",
                "As a child the applicant was taught in {}",
            ),
            (
                "In which {place} did the candidate learn to read?",
                "What {place} was the candidate a pupil in?",
                "In which {place} did the candidate sit in lessons when young?",
            ),
        ),
        Fact(
            "volunteering",
            (
                "Unpaid help was given in {}",
                "As a volunteer the applicant served in {}",
                "Charity work was done in {}",
            ),
            (
                "In which {place} did the candidate work for nothing?",
                "What {place} profited from the candidate without wages?",
                "In which {place} did the candidate assist the needy?",
            ),
        ),
    ),
    "person": (
        Fact(
            "applicant",
            (
                "The applicant is called {}",
                "This curriculum belongs to {}",
                "The post is sought by {}",
            ),
            (
                "Who is the candidate?",
                "What is the name of the job seeker?",
                "Whose life is described?",
            ),
        ),
        Fact(
            "reference",
            (
                "A recommendation can be had from {}",
                "References are given by {}",
                "Good words about the applicant come from {}",
            ),
            (
                "Who can be asked whether the candidate is good?",
                "What is the name of the person who vouches?",
                "Who praises the candidate on request?",
            ),
        ),
        Fact(
            "professor",
            (
                "The thesis was supervised by {}",
                "The doctoral adviser was {}",
                "The final paper was marked by {}",
            ),
            (
                "Who guided the candidate in research?",
                "What is the name of the professor?",
                "Who was the academic teacher of the candidate?",
            ),
        ),
        Fact(
            "manager",
            (
                "The current superior is {}",
                "At present the applicant reports to {}",
                "The department is headed by {}",
            ),
            (
                "Who is the boss of the candidate?",
                "What is the name of the manager today?",
                "Who gives orders to the candidate now?",
            ),
        ),
        Fact(
            "partner",
            (
                "The applicant is married to {}",
                "The spouse is {}",
                "At home the applicant lives with {}",
            ),
            (
                "Who is the partner of the candidate?",
                "What is the name of the person at the wedding?",
                "Who shares the private life of the candidate?",
            ),
        ),
    ),
    "subject": (
        Fact(
            "major",
            (
                "The main subject at university was {}",
                "The degree is in {}",
                "The applicant graduated in {}",
            ),
            (
                "What did the candidate study?",
                "Which field was at the centre of college?",
                "Which discipline stands on the diploma?",
            ),
        ),
        Fact(
            "minor",
            (
                "The second subject was {}",
                "As a minor the applicant chose {}",
                "Besides, some courses were taken in {}",
            ),
            (
                "What was read on the side?",
                "Which field came along as a supplement at college?",
                "Which discipline was studied with less weight?",
            ),
        ),
        Fact(
            "teaching",
            (
                "Evening classes are taught in {}",
                "The applicant gives lessons in {}",
                "Pupils are tutored in {}",
            ),
            (
                "What does the candidate explain to others?",
                "Which field is the candidate a teacher of?",
                "Which discipline do learners hear about from the candidate?",
            ),
        ),
        Fact(
            "hobby",
            (
                "In leisure time the applicant enjoys {}",
                "A private passion is {}",
                "The favourite pastime is {}",
            ),
            (
                "What is the hobby of the candidate?",
                "Which field is fun for the candidate on weekends?",
                "Which discipline is only amusement?",
            ),
        ),
        Fact(
            "weakness",
            (
                "At school the worst marks were in {}",
                "The applicant admits to know little about {}",
                "A weak point is {}",
            ),
            (
                "What should the candidate still learn?",
                "Which field is difficult for the candidate?",
                "Which discipline did the pupil fail at?",
            ),
        ),
    ),
}

PRODUCT: dict[str, tuple[Fact, ...]] = {
    "money": (
        Fact(
            "price",
            (
                "The device is sold at {}",
                "In the shop the device is offered for {}",
                "The retail price is {}",
            ),
            (
                "What does the product cost?",
                "How much must a customer spend to own it?",
                "What has to be paid at the checkout?",
            ),
        ),
        Fact(
            "shipping",
            (
                "Delivery is charged at {}",
                "For transport to the door {} is added",
                "The postage is {}",
            ),
            (
                "What does shipping cost?",
                "How much is the parcel service?",
                "What has to be paid for sending the product?",
            ),
        ),
        Fact(
            "spare battery",
            (
                "A second battery is available for {}",
                "Replacement of the battery is billed at {}",
                "The price of a new battery is {}",
            ),
            (
                "What does fresh energy storage cost?",
                "How much is an accumulator?",
                "What has to be paid when the cells are dead?",
            ),
        ),
        Fact(
            "deposit",
            (
                "A deposit of {} is returned later",
                "As a security the buyer leaves {}",
                "The refundable pledge is {}",
            ),
            (
                "What does the customer get back?",
                "How much money is kept for a while only?",
                "What has to be paid as a guarantee?",
            ),
        ),
        Fact(
            "repair",
            (
                "A repair is done for {}",
                "The workshop fixes faults at {}",
                "Mending the device is billed at {}",
            ),
            (
                "What does it cost when something is broken?",
                "How much does the technician ask?",
                "What has to be paid after damage?",
            ),
        ),
    ),
    "length": (
        Fact(
            "height",
            (
                "From foot to top it measures {}",
                "The height is {}",
                "Standing upright the device reaches {}",
            ),
            (
                "How tall is the product?",
                "What is the vertical size?",
                "How high must a shelf be?",
            ),
        ),
        Fact(
            "width",
            (
                "From left to right it measures {}",
                "The width is {}",
                "Between its two sides there are {}",
            ),
            (
                "How broad is the product?",
                "What is the horizontal size?",
                "How wide is the front?",
            ),
        ),
        Fact(
            "cable",
            (
                "The cable is {}",
                "The cord measures {}",
                "The lead to the socket reaches {}",
            ),
            (
                "How long is the wire?",
                "What is the distance to the plug?",
                "How far from the power point can it stand?",
            ),
        ),
        Fact(
            "screen",
            (
                "The diagonal of the screen is {}",
                "The display measures {}",
                "The screen extends over {}",
            ),
            (
                "How large is the picture?",
                "What is the size of the monitor?",
                "How big is the panel?",
            ),
        ),
        Fact(
            "carton",
            (
                "The carton is {}",
                "The packaging measures {}",
                "The box around it reaches {}",
            ),
            (
                "How large is the parcel?",
                "What is the size of the wrapping?",
                "How big is the container for shipping?",
            ),
        ),
    ),
    "duration": (
        Fact(
            "warranty",
            (
                "The maker gives a warranty of {}",
                "Free repair is promised for {}",
                "Defects are covered for {}",
            ),
            (
                "How long is the guarantee?",
                "For what time is the customer protected?",
                "How long does the producer answer for faults?",
            ),
        ),
        Fact(
            "charging",
            (
                "Charging takes {}",
                "The battery is full after {}",
                "At the socket the battery is filled within {}",
            ),
            (
                "How long must the product be plugged in?",
                "For what time does it draw current from the wall?",
                "How long does loading energy last?",
            ),
        ),
        Fact(
            "runtime",
            (
                "Away from the socket it works for {}",
                "One battery filling lasts {}",
                "Without mains it goes on for {}",
            ),
            (
                "How long is the product independent of the wall?",
                "For what time can it be used outdoors?",
                "How long is it before the accumulator is empty?",
            ),
        ),
        Fact(
            "delivery time",
            (
                "Delivery takes {}",
                "The parcel arrives after {}",
                "The carrier brings it within {}",
            ),
            (
                "How long does the customer wait?",
                "For what time is the product on its way?",
                "How long does shipping last?",
            ),
        ),
        Fact(
            "return",
            (
                "The buyer may send it back within {}",
                "Goods are taken back for {}",
                "Regret is possible for {}",
            ),
            (
                "How long can the purchase be undone?",
                "For what time may one change one's mind?",
                "How long is the right of return?",
            ),
        ),
    ),
    "material": (
        Fact(
            "housing",
            (
                "The housing is made of {}",
                "The body consists of {}",
                "The shell is {}",
            ),
            (
                "What is the outside of the product?",
                "What does the case consist of?",
                "Which material covers the interior?",
            ),
        ),
        Fact(
            "handle",
            (
                "The handle is made of {}",
                "The grip consists of {}",
                "The part one holds is {}",
            ),
            (
                "What does the hand touch?",
                "What is it carried by?",
                "Which material lies between the fingers?",
            ),
        ),
        Fact(
            "base",
            (
                "The base is made of {}",
                "The stand consists of {}",
                "Its feet are {}",
            ),
            (
                "What is it standing on?",
                "What is underneath the product?",
                "Which material is in contact with the table?",
            ),
        ),
        Fact(
            "lid",
            (
                "The lid is made of {}",
                "The cover consists of {}",
                "The flap at the top is {}",
            ),
            (
                "What is opened first?",
                "What is above the container?",
                "Which material closes the product?",
            ),
        ),
        Fact(
            "packaging",
            (
                "The packaging is made of {}",
                "The box around it consists of {}",
                "It is wrapped in {}",
            ),
            (
                "What is thrown away after buying?",
                "What protects the product in shipping?",
                "Which material is the parcel?",
            ),
        ),
    ),
    "region": (
        Fact(
            "assembly",
            (
                "The device is assembled in {}",
                "The factory stands in {}",
                "Workers put it together in {}",
            ),
            (
                "In which {place} is the product made?",
                "What {place} is the plant in?",
                "In which {place} is it manufactured?",
            ),
        ),
        Fact(
            "design",
            (
                "The device was drawn by artists in {}",
                "Its shape was designed in {}",
                "The engineers sit in {}",
            ),
            (
                "In which {place} was the product invented?",
                "What {place} do its looks come from?",
                "In which {place} was it developed?",
            ),
        ),
        Fact(
            "warehouse",
            (
                "The goods are stored in {}",
                "The warehouse is in {}",
                "Parcels leave from {}",
            ),
            (
                "In which {place} does the product wait for a buyer?",
                "What {place} is the depot in?",
                "In which {place} does shipping begin?",
            ),
        ),
        Fact(
            "workshop",
            (
                "Broken devices are mended in {}",
                "Repairs are done in {}",
                "The service workshop is in {}",
            ),
            (
                "In which {place} does the technician fix faults?",
                "What {place} is a damaged product sent to?",
                "In which {place} is help after a defect?",
            ),
        ),
        Fact(
            "test lab",
            (
                "Safety was tested in {}",
                "The laboratory for checks is in {}",
                "Inspectors examined it in {}",
            ),
            (
                "In which {place} was the product approved?",
                "What {place} issued the certificate?",
                "In which {place} was it found to be harmless?",
            ),
        ),
    ),
}

FACTS: dict[str, dict[str, tuple[Fact, ...]]] = {
    "contract": CONTRACT,
    "cv": CV,
    "product": PRODUCT,
}

FILLERS: dict[str, tuple[str, ...]] = {
    "contract": (
        "Changes must be made in writing",
        "Each party keeps one copy of this paper",
        "Business secrets must not be told to anyone",
        "Tools of the company must be handled with care",
        "The employee carries out the work in person",
        "The rules of the house are part of this contract",
    ),
    "cv": (
        "The applicant is a friendly and patient person",
        "Further papers are enclosed",
        "The applicant works well in a team",
        "An interview is possible at any time",
        "The applicant likes to solve hard problems",
        "All statements are true",
    ),
    "product": (
        "Keep the device away from children",
        "The manual should be read before use",
        "Clean the surface with a soft cloth",
        "The device must not be put into water",
        "Details may change without notice",
        "The device is quiet and easy to use",
    ),
}

OPENINGS: tuple[str, ...] = (
    "As agreed, ",
    "Please note: ",
    "In detail, ",
    "Moreover, ",
    "To be clear, ",
    "In addition, ",
)

FIRST_NAMES: tuple[str, ...] = tuple(
    "Anna Boris Clara David Elena Felix Greta Hugo Ida Jonas Karin Lukas Maria Nils Olga Paul Rosa Simon Tanja Victor "
    "Wanda Xavier Yusuf Zoe Amir Bella Carlos Diana Emil Fatima Georg Hanna".split()
)
LAST_NAMES: tuple[str, ...] = tuple(
    "Abel Brandt Costa Dorn Engel Fischer Garcia Huber Ivanov Jansen Keller Lopez Meyer Novak Olsen Peters Quinn Rossi "
    "Schmidt Tanaka Unger Vogel Weber Yilmaz Ziegler Adler Becker Conti Dubois Evans Frank Gruber".split()
)
REGIONS: dict[str, tuple[str, ...]] = {
    "Germany": ("Bavaria", "Hesse", "Saxony", "Thuringia"),
    "Austria": ("Tyrol", "Styria", "Carinthia", "Salzburg"),
    "America": ("Texas", "Ohio", "Nevada", "Oregon"),
    "Canada": ("Ontario", "Quebec", "Manitoba", "Alberta"),
    "Italy": ("Tuscany", "Sicily", "Lombardy", "Umbria"),
    "Spain": ("Galicia", "Aragon", "Murcia", "Andalusia"),
    "France": ("Brittany", "Normandy", "Alsace", "Provence"),
    "Brazil": ("Bahia", "Parana", "Amazonas", "Goias"),
    "India": ("Kerala", "Punjab", "Gujarat", "Assam"),
    "Mexico": ("Jalisco", "Sonora", "Oaxaca", "Yucatan"),
}
COMPANIES: tuple[str, ...] = tuple(
    "Nordwerk Altona Belmont Corvex Delphin Eurotek Fontana Globus Helios Intera Jupiter Kronos Lumina Mercator Nexus "
    "Orbital Primus Quantix Regalis Solaris Titania Unitas Vertex Westfal Xenon Zenith".split()
)
SUBJECTS: tuple[str, ...] = tuple(
    "physics chemistry biology history law medicine music geology philosophy economics astronomy botany statistics "
    "theology linguistics architecture painting poetry drama zoology".split()
)
MATERIALS: tuple[str, ...] = tuple(
    "steel oak glass plastic rubber leather bamboo aluminium copper ceramic cotton marble titanium cork brass paper".split()
)
MONTHS: tuple[str, ...] = tuple(
    "January February March April May June July August September October November December".split()
)
ORDINALS: tuple[str, ...] = tuple(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third twenty-fourth "
    "twenty-fifth twenty-sixth twenty-seventh twenty-eighth".split()
)
NUMBER_WORDS: tuple[str, ...] = tuple(
    "two three four five six seven eight nine ten eleven twelve".split()
)
